"""Every reply says what the model got of its pictures, and warns where small text is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from demo.chat import ChatPicture, ChatTurn, example_of
from demo.preview import preview_html
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from tests.builders.conversations import asked, picture
from tests.builders.launches import commanded
from tests.builders.tiny import SIDE_PX, make_checkpoint

ONE = Sampling(max_new_tokens=1)


@pytest.mark.parametrize(
    ("mode", "seen", "readable_px"),
    [
        ({"image_mode": "stretch"}, (32, 32), 80),  # 320 pixels of width on 32
        ({"image_mode": "pad"}, (32, 32), 80),
        ({"image_mode": "crop"}, (32, 32), 40),  # the height of 160 decides, and the sides are cut off
        ({"image_mode": "anyres"}, (32, 64), 40),  # two tiles side by side
        ({"image_mode": "native", "max_image_tokens": 9}, (32, 64), 40),  # two tokens of 16 pixels high, four wide
    ],
    ids=lambda value: value.get("image_mode") if isinstance(value, dict) else None,
)
def test_a_reply_says_how_much_of_a_picture_was_seen(
    mode: dict[str, Any], seen: tuple[int, int], readable_px: int, tiny_parts: Path, tmp_path: Path
) -> None:
    engine = Engine.load(make_checkpoint(tmp_path / "model", tiny_parts, **mode), device="cpu", verify=False)
    wide, small = picture(1, 320, 160), picture(2, SIDE_PX, SIDE_PX)
    reply = engine.reply(asked("<image>\n<image>\nwhat is it?", wide, small), ONE)
    large, unchanged = reply.pictures
    assert (large.original_size, large.seen_size) == ((160, 320), seen)
    assert large.num_tokens + unchanged.num_tokens == reply.num_image_tokens
    assert f"shrunk to {seen[1]} x {seen[0]} pixels" in large.warning
    assert f"letters lower than {readable_px} pixels" in large.warning
    assert unchanged.warning == ""
    assert [*engine.stream(asked("<image>?", small), ONE)][-1].pictures == (unchanged,)


def test_chat_and_page_show_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    picture(1, 400, 300).save(file)
    done = commanded("chat", tiny_checkpoint, "--image", file, "--prompt", "what?", "--max-new-tokens", 2, "--json")
    (seen,) = json.loads(done.stdout)["pictures"]
    assert (seen["original_size"], seen["seen_size"], seen["num_tokens"]) == ([300, 400], [32, 32], 4)
    plain = commanded("chat", tiny_checkpoint, "--image", file, "--prompt", "what?", "--max-new-tokens", 2)
    assert f"(picture 1: {seen['warning']})" in plain.stderr
    engine = Engine.load(tiny_checkpoint, device="cpu")
    turn = ChatTurn("what?", (ChatPicture(file, file, engine.prepare(file)),))
    assert seen["warning"] in preview_html(engine, example_of([turn]))


def test_chat_takes_every_setting_and_says_what_is_wrong(tiny_checkpoint: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"a": {"enum": ["red"]}}, "required": ["a"], "additionalProperties": false}'
    )
    drawn = ("--temperature", 1.0, "--seed", 3, "--top-k", 5, "--min-p", 0.01, "--repetition-penalty", 1.1)
    ended = ("--presence-penalty", 0.5, "--stop", "zzz", "--ban", "q", "--prefix", "a circle")
    arguments = ("chat", tiny_checkpoint, "--prompt", "what?", "--max-new-tokens", 5)
    done = commanded(*arguments, *drawn, *ended)
    assert (done.returncode, done.stdout[:8]) == (0, "a circle")
    wrong = commanded(*arguments, "--top-k", -1)
    assert (wrong.returncode, "top_k must be 0 (all tokens) or more, got -1" in wrong.stderr) == (1, True)
    pytest.importorskip("llguidance")
    done = commanded(*arguments[:-1], 40, "--json-schema", schema)
    assert json.loads(done.stdout) == {"a": "red"}
