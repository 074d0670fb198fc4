"""`mmllm caption`: one line a picture, whatever happens to the job on its way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmllm.captioning.inputs import PictureInputs
from mmllm.checkpoint.folder import load_checkpoint, save_checkpoint
from mmllm.cli import app
from mmllm.inference.engine import Engine, Reply
from mmllm.inference.sampling import Sampling
from mmllm.readers.folders import PICTURE_ENDINGS

WAIT_SECONDS = 100


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures, one of them down in a folder, a broken one, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    for name, color in (("b.png", "red"), ("a.JPG", "blue"), ("deep/c.webp", "green"), ("deep/er/d.gif", "black")):
        Image.new("RGB", (40, 30), color).save(folder / name)
    Image.new("RGB", (40, 30), "white").save(folder / "by_name", "PNG")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def caption(model: Path, *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command."""
    options = ["--max-new-tokens", "3", "--batch-size", "2"]
    done = CliRunner().invoke(app, ["caption", str(model), *map(str, arguments), *options])
    return done.exit_code, done.stdout, done.stderr


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(path: Path) -> list[str]:
    return [Path(row["image"]).name for row in lines(path)]


def test_folders_are_searched_for_pictures_and_files_are_always_tried(pictures: Path) -> None:
    inputs = [str(path) for path in (pictures, pictures / "b.png", pictures / "notes.txt", pictures / "gone.png")]
    found = {str(Path(one.place).relative_to(pictures)) for one in PictureInputs(inputs) if not one.unread}
    assert found == {"a.JPG", "b.png", "broken.png", "deep/c.webp", "deep/er/d.gif", "gone.png", "notes.txt"}


def test_every_picture_gets_one_line_and_a_broken_one_stops_nothing(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "captions.jsonl"
    status, said, err = caption(
        tiny_checkpoint,
        pictures,
        pictures / "by_name",
        pictures / "b.png",
        "--out",
        out,
        "--prompt",
        "write a caption.",
    )
    assert status == 1
    assert names(out) == ["a.JPG", "b.png", "by_name", "c.webp", "d.gif"]
    for row in lines(out):
        assert row["caption"]
        assert (row["model"], row["prompt"]) == ("checkpoint", "write a caption.")
        assert (row["finish"], row["num_new_tokens"]) == ("length", 3)  # cut off, kept, marked
    (failed,) = lines(out.with_name("captions.jsonl.failed.jsonl"))
    assert failed["image"] == str(pictures / "broken.png")
    assert "broken.png is" in failed["error"]
    assert failed["error"] in err
    assert "5 pictures captioned" in said
    assert "1 pictures were named more than once" in said
    assert '"finish": "length"' in said


def test_a_second_run_captions_what_is_left(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    caption(tiny_checkpoint, pictures, "--out", out)
    before = out.read_bytes()
    Image.new("RGB", (9, 9)).save(pictures / "broken.png")
    status, said, _ = caption(tiny_checkpoint, pictures, "--out", out)
    assert status == 0
    assert "4 of 5 pictures have a caption" in said
    assert names(out) == ["a.JPG", "b.png", "broken.png", "c.webp", "d.gif"]  # by path: as of a job never stopped
    assert set(before.splitlines()) < set(out.read_bytes().splitlines())
    assert not out.with_name("captions.jsonl.failed.jsonl").exists()
    status, said, _ = caption(tiny_checkpoint, pictures, "--out", out, "--prompt", "another prompt")
    assert status == 0
    assert "5 of 5 pictures have a caption" in said
    assert "5 of them by another model or prompt" in said
    assert len(lines(out)) == 5


def test_a_half_written_last_line_is_written_anew(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    caption(tiny_checkpoint, pictures, "--out", out)
    whole = out.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for kept in (1, 9, len(last) // 2, len(last) - 2):
        out.write_bytes(whole[: -len(last) + kept])
        caption(tiny_checkpoint, pictures, "--out", out)
        assert out.read_bytes() == whole
    out.write_bytes(whole[:-1])  # all but the line's end is a whole line
    caption(tiny_checkpoint, pictures, "--out", out)
    assert out.read_bytes() == whole


@pytest.mark.parametrize("content", ["my only copy of the shopping list", '{"image": "a.png"}\n', "[1]\n", "{}\n{}"])
def test_a_file_of_something_else_is_left_alone(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, content: str
) -> None:
    out = tmp_path / "list.txt"
    out.write_text(content)
    status, _, err = caption(tiny_checkpoint, pictures, "--out", out)
    assert status == 1
    assert "line 1 is not a caption" in err
    assert out.read_text() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{empty}", "--out", "{out}"],
            "no pictures in {empty}; searched for files that end in " + " ".join(PICTURE_ENDINGS),
        ),
        (["{picture}", "--out", "{empty}"], "is a folder or a device"),
        (["{picture}", "--out", "/dev/full"], "is a folder or a device"),
        (["{picture}", "--out", "{out}", "--prompt", " "], "the prompt is empty"),
        (["{picture}", "--out", "{out}", "--prompt", "{{kind}}?"], "the prompt has the field {{kind}}"),
        (["{picture}", "--out", "{out}", "--redo", "all"], "--redo all is not known; allowed: cut, flagged"),
        (["{picture}", "--out", "{out}", "--format", "yaml"], "--format yaml is not known; allowed: jsonl"),
        (["{picture}", "--out", "{out}", "--script", "runes"], "--script runes is not known; allowed: auto"),
        (["{picture}", "--out", "{out}", "--image-column", "x"], "--image-column x is of a list"),
        (["{picture}", "--out", "{picture}", "--format", "parquet"], "b.png exists, and no captioning job wrote it"),
        (["{picture}", "--out", "{picture}", "--format", "txt"], "b.png is a file; --format txt writes a folder"),
        (["{empty}/*.png", "--out", "{out}"], "no file matches"),
        (["nosuch://x", "--out", "{out}"], "nosuch://x"),
    ],
)
def test_wrong_use_is_one_message_and_writes_no_caption(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "out": tmp_path / "out.jsonl", "picture": pictures / "b.png"}
    status, _, err = caption(tiny_checkpoint, *(text.format(**places) for text in arguments))
    assert status == 1
    assert message.format(**places) in err
    assert "Traceback" not in err
    assert not places["out"].exists()
    assert not list(tmp_path.rglob("*.ledger"))


def test_an_unknown_device_is_wrong_usage(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    status, _, err = caption(tiny_checkpoint, pictures, "--out", tmp_path / "out.jsonl", "--device", "warp")
    assert status == 2
    assert "'warp' is none of auto, cpu, mps, cuda" in err


def test_a_wrong_model_is_told_before_anything_is_written(pictures: Path, tmp_path: Path) -> None:
    status, _, err = caption(tmp_path / "gone", pictures, "--out", tmp_path / "out.jsonl")
    assert status == 1
    assert "no model at" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_caption_without_words_is_kept_and_marked(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    model, processor, _ = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        model.language_model.lm_head.weight.zero_()  # then it says padding only
    save_checkpoint(tmp_path / "mute", model, processor, card="")
    status, said, _ = caption(tmp_path / "mute", pictures / "b.png", "--out", tmp_path / "out.jsonl", "--no-retry")
    (row,) = lines(tmp_path / "out.jsonl")
    assert (status, row["caption"], row["finish"]) == (0, "", "empty")
    assert "without words" in said


def test_replies_are_those_of_the_chat(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    from mmllm.chat.conversation import Conversation

    caption(tiny_checkpoint, pictures, "--out", tmp_path / "out.jsonl", "--prompt", "what?")
    engine = Engine.load(tiny_checkpoint)
    for row in lines(tmp_path / "out.jsonl"):
        reply = engine.reply(Conversation().ask("what?", [row["image"]]), Sampling(max_new_tokens=3))
        assert isinstance(reply, Reply)
        assert row["caption"] == reply.text


def test_a_caption_that_was_cut_off_is_written_anew_where_it_may_be_longer(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "captions.jsonl"
    (pictures / "broken.png").unlink()
    _, said, _ = caption(tiny_checkpoint, pictures, "--out", out)
    assert "the same command with --max-new-tokens 6 writes them again" in said
    assert [row["finish"] for row in lines(out)] == ["length"] * 4
    _, said, _ = caption(tiny_checkpoint, pictures, "--out", out)  # not with the same limit
    assert "0 left" in said
    before = out.read_text().splitlines()
    out.write_text("".join(line + "\n" for line in [*before[:3], before[3].replace('"length"', '"end"')]))
    options = ["caption", str(tiny_checkpoint), str(pictures), "--out", str(out), "--max-new-tokens", "6"]
    said = CliRunner().invoke(app, options).stdout
    assert "3 left, 3 of them cut off before and written again now" in said
    rows = lines(out)
    assert Counter(row["image"] for row in rows) == Counter(json.loads(line)["image"] for line in before)
    assert sorted(row["max_new_tokens"] for row in rows) == [3, 6, 6, 6]
