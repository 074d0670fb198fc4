"""`mmllm explain`: what the model sees and is taught from one example, and whether it is asked the same way later."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from mmllm.batch import IMAGE_TOKEN, picture_marks
from mmllm.chat.conversation import Conversation
from mmllm.cli import app
from mmllm.config.file import load_config
from mmllm.data.sources import read_source
from mmllm.diagnose import explain_terminal
from mmllm.diagnose.explain import explain, runs
from mmllm.diagnose.explain_page import page
from mmllm.diagnose.prompt_setup import load_prompt_setup
from mmllm.inference.engine import Engine
from tests.builders.page_driver import NARROW, WIDE

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>alert(1)</script> & \x1b[31m naïve 日本 🙂\tx"


def run(config: Path, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["explain", str(config), *arguments])
    return done.exit_code, done.stdout, done.stderr


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


@pytest.fixture
def config(tmp_path: Path, tiny_runs: Path) -> Path:
    """Stage 2 on a few rows more: hostile ones, and such as a run leaves out."""
    Image.new("RGB", (9, 5), "red").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"GIF89a, or so it says")
    rows = [
        {"id": "hostile", "image": "good.png", "conversations": [human(f"<image>\n{HOSTILE}"), gpt(f"a\n{HOSTILE}")]},
        {"id": "system", "conversations": [{"from": "system", "value": "be kind"}, human("why?"), gpt("so")]},
        {"id": "mute", "image": "good.png", "conversations": [human("<image>"), gpt("a red picture")]},
        {"id": "behind", "image": "good.png", "conversations": [human("what is it? <image>"), gpt("red")]},
        {"id": "pair", "image": ["good.png"] * 2,
         "conversations": [human(f"{picture_marks(2)}same?"), gpt("yes")]},
        {"id": "long", "conversations": [human("what " * 600), gpt("yes")]},
        {"id": "undecodable", "image": "broken.png", "conversations": [human("<image>\nis it?"), gpt("yes")]},
        {"id": "wrong", "conversations": [gpt("yes")]},
        {"id": "text-red", "conversations": [human("again?"), gpt("yes")]},
    ]  # fmt: skip
    (tmp_path / "more.json").write_text(json.dumps(rows))
    settings = yaml.safe_load((tiny_runs / "stage2.yaml").read_text())
    settings["data"]["val"] = [{"path": str(tmp_path / "more.json")}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def ids(config: Path) -> list[str]:
    data = load_config(config).data  # type: ignore[attr-defined]
    return [example.id for source in (*data.train, *data.val) for example in read_source(source).examples]


def test_every_example_has_the_tokens_that_a_run_trains_on(config: Path) -> None:
    renderer = load_prompt_setup(load_config(config).model).renderer  # type: ignore[attr-defined]
    for name in set(ids(config)) - {"long", "undecodable", "system"}:
        found = explain(config, [], sample=name)
        rendered = renderer.render_example(found.example)
        assert [token.id for token in found.tokens] == rendered.input_ids
        assert [token.kind in ("answer", "end") for token in found.tokens] == rendered.is_answer
        assert [token.is_supervised for token in found.tokens] == [False, *rendered.is_answer[1:]]
        assert found.counts["image"] == rendered.num_image_tokens == 4 * len(found.example.images)
        assert found.counts["total"] == len(rendered.input_ids)
        assert found.counts["supervised"] == sum(rendered.is_answer)


def test_the_texts_of_the_tokens_are_the_text_of_the_conversation(config: Path) -> None:
    renderer = load_prompt_setup(load_config(config).model).renderer  # type: ignore[attr-defined]
    for name in ("hostile", "two-1", "text-blue", "pair"):
        found = explain(config, [], sample=name)
        texts = [
            IMAGE_TOKEN * (len(group) // renderer.num_image_tokens)
            if group[0].kind == "image"
            else "".join(token.text for token in group)
            for _, group in runs(found.tokens)
        ]
        assert "".join(texts) == renderer.text(found.example.messages)
        answers = [
            text for text, (_, group) in zip(texts, runs(found.tokens), strict=True) if group[0].kind == "answer"
        ]
        assert answers == [turn.text for turn in found.example.messages if turn.role == "assistant"]
        ends = [text for text, (_, group) in zip(texts, runs(found.tokens), strict=True) if group[0].kind == "end"]
        assert set(ends) == {"<|end|>"}


def test_a_picture_is_shown_as_it_is_stored_and_as_the_tower_sees_it(config: Path, tiny_checkpoint: Path) -> None:
    engine = Engine.load(tiny_checkpoint)
    found = explain(config, [], sample="two-0")
    assert [picture.name for picture in found.pictures] == list(found.example.images)
    for picture in found.pictures:
        assert np.array_equal(picture.stored, Image.open(picture.name))
        assert np.array_equal(picture.seen, engine.preview(picture.name))
        assert picture.seen.size == (32, 32)


def test_a_checkpoint_brings_its_own_transform_and_template(config: Path, tiny_checkpoint: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["model"] = {"checkpoint": str(tiny_checkpoint)}
    (config.parent / "from.yaml").write_text(yaml.safe_dump(settings))
    own, parts = (explain(path, [], sample="one-1") for path in (config.parent / "from.yaml", config))
    assert own.tokens == parts.tokens
    assert np.array_equal(own.pictures[0].seen, parts.pictures[0].seen)
    other = explain(config.parent / "from.yaml", ["model.template=vicuna_v1"], sample="one-1")
    assert (other.template, own.template) == ("vicuna_v1", "tokenizer")
    assert other.counts["prompt"] > own.counts["prompt"]


def test_the_weights_of_the_llm_are_not_needed(config: Path, tiny_parts: Path) -> None:
    shutil.copytree(tiny_parts, config.parent / "parts")
    (config.parent / "parts" / "language" / "model.safetensors").unlink()
    config.write_text(config.read_text().replace(str(tiny_parts), str(config.parent / "parts")))
    assert run(config)[0] == 0


def test_the_inference_prompt_is_what_the_engine_asks_with(config: Path, tiny_checkpoint: Path) -> None:
    renderer = Engine.load(tiny_checkpoint).renderer
    found = explain(config, [], sample="one-1")
    picture = found.example.images[0]
    conversation = Conversation()
    first = renderer.render(conversation.ask("what is in the picture?", [picture]).messages)
    conversation.add("what is in the picture?", [picture], found.prompts[0].answer)
    second = renderer.render(conversation.ask("is it large?").messages)
    assert [[token.id for token in asked.inference or ()] for asked in found.prompts] == [
        first.input_ids,
        second.input_ids,
    ]
    assert [asked.answer for asked in found.prompts] == [found.example.messages[1].text, "no"]
    ids = [token.id for token in found.tokens]
    assert [ids[: len(asked.training)] for asked in found.prompts] == [first.input_ids, second.input_ids]


@pytest.mark.parametrize("name", ["one-0", "one-1", "text-blue", "hostile", "pair"])
def test_data_that_are_asked_as_they_were_trained_are_equal(config: Path, name: str) -> None:
    found = explain(config, [], sample=name)
    assert found.verdict.startswith("equal: chat, captioning and evaluation prompt for its ")
    assert [asked.differs_at for asked in found.prompts] == [None] * len(found.prompts)
    assert found.to_json()["equal"]
    assert found.reasons == []


@pytest.mark.parametrize(("name", "places", "reason"), [
    ("two-0", [None, "and"], "pictures are not where the chat puts them"),
    ("behind", ["what"], "pictures are not where the chat puts them"),
    ("system", ["b"], "it has a system turn, and chat, captioning and evaluation send none"),
])  # fmt: skip
def test_where_training_and_inference_differ_is_named(
    config: Path, name: str, places: list[str | None], reason: str
) -> None:
    found = explain(config, ["model.template=vicuna_v1"], sample=name)
    assert [asked.differs_at is None for asked in found.prompts] == [place is None for place in places]
    for asked, place in zip(found.prompts, places, strict=True):
        if place is not None and asked.inference is not None:
            at = asked.differs_at
            assert at is not None
            assert asked.training[at].text.strip() == place
            assert [token.id for token in asked.training[:at]] == [token.id for token in asked.inference[:at]]
            assert asked.training[at] != asked.inference[at]
    assert found.verdict.startswith("different: ")
    assert any(reason in text for text in found.reasons)
    status, out, _ = run(config, "--sample", name, "model.template=vicuna_v1")
    assert status == 0
    assert f"differs from position {found.prompts[-1].differs_at} on" in out


def test_a_question_without_words_cannot_be_asked(config: Path) -> None:
    found = explain(config, [], sample="mute")
    assert (found.prompts[0].inference, found.prompts[0].differs_at) == (None, 0)
    assert "cannot be asked, a question needs words" in run(config, "--sample", "mute")[1]
    assert "cannot be asked" in page(found)


def test_without_an_id_the_first_example_is_explained(config: Path) -> None:
    status, out, _ = run(config, "--json")
    report = json.loads(out)
    assert (status, report["id"], report["split"]) == (0, "one-0", "train")
    assert report["counts"]["total"] == len(report["tokens"])
    assert [len(picture["seen_px"]) for picture in report["pictures"]] == [2]
    assert set(report["tokens"][0]) == {"id", "text", "kind", "is_supervised"}


def test_an_example_is_found_in_val_and_in_train_before_val(config: Path) -> None:
    assert json.loads(run(config, "--json", "--sample", "pair")[1])["split"] == "val"
    both = json.loads(run(config, "--json", "--sample", "text-red")[1])
    assert (both["split"], both["also_in"]) == ("train", [str(config.parent / "more.json")])
    assert "note: other files hold an example with this id: " in run(config, "--sample", "text-red")[1]


@pytest.mark.parametrize(("name", "status", "text"), [
    ("one-77", 2, r"error: --sample: no example 'one-77' among the 2\d of train and val; similar ids: .*one-7"),
    ("zzz", 2, r"similar ids: none"),
    ("long", 1, r"the run would leave out long: 6\d\d tokens .* are more than data\.max_length_tokens = 512"),
    ("wrong", 1, r"the run would leave out --sample wrong: .*more\.json row 7: turn 0 is from gpt"),
    ("undecodable", 1, r"broken\.png is (damaged|not an image)"),
])  # fmt: skip
def test_an_id_that_cannot_be_explained_says_why(config: Path, name: str, status: int, text: str) -> None:
    found, out, err = run(config, "--sample", name, "--html", str(config.parent / "out.html"))
    assert (found, out) == (status, "")
    assert re.search(text, err)
    assert not (config.parent / "out.html").exists()


def test_an_example_that_the_template_cannot_hold_is_explained_by_its_reason(config: Path) -> None:
    status, _, err = run(config, "--sample", "system", "model.template=plain")
    assert status == 1
    assert "the run would leave out system: the chat template refuses this conversation: it has no system" in err


def test_only_a_stage_with_data_can_be_explained() -> None:
    status, _, err = run(ROOT / "configs" / "tiny" / "warmup_vision.yaml")
    assert status == 2
    assert "makes its own data; there is nothing to explain" in err


def test_the_terminal_shows_kinds_counts_and_verdict_and_obeys_no_data(config: Path) -> None:
    status, out, _ = run(config, "--sample", "hostile")
    assert status == 0
    found = explain(config, [], sample="hostile")
    for text in ("good.png: 9 x 5, 32 x 32 as the tower sees it", "<image> x 4", "inference prompt equal: chat"):
        assert text in out
    for kind in ("image", "prompt", "answer", "end"):
        assert re.search(rf" {found.counts[kind]} {kind} ", out)
    assert "\x1b" not in out


def test_a_terminal_with_colors_shows_the_picture_in_half_blocks() -> None:
    picture = Image.new("RGB", (2, 4), "red")
    picture.paste("blue", (0, 1, 2, 2))
    text = explain_terminal.half_blocks(picture, 32)
    assert text.plain == "▀▀\n▀▀\n"
    console = Console(force_terminal=True, color_system="truecolor", width=20)
    with console.capture() as captured:
        console.print(text)
    assert "38;2;255;0;0;48;2;0;0;255m▀" in captured.get()


class Links(HTMLParser):
    """What a page would load, and the text of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_needs_nothing_else_and_runs_nothing(config: Path) -> None:
    target = config.parent / "new" / "page.html"
    assert run(config, "--sample", "hostile", "--html", str(target))[0] == 0
    html = target.read_text(encoding="utf-8")
    links = Links()
    links.feed(html)
    assert len(links.loads) == 2
    assert all(link.startswith("data:image/png;base64,") for link in links.loads)
    assert not links.tags & {"script", "link", "iframe", "object"}
    assert "http" not in re.sub(r"http-equiv", "", html)
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    assert "\x1b" not in html


@pytest.mark.browser
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", ["hostile", "two-0"])
def test_the_page_can_be_read_in_a_browser(config: Path, browser, name: str, size: dict[str, int]) -> None:
    found = explain(config, [], sample=name)
    path = config.parent / "page.html"
    path.write_text(page(found), encoding="utf-8")
    context = browser.new_context(viewport=size)
    tab = context.new_page()
    requests: list[str] = []
    problems: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: problems.append(message.text))
    tab.goto(path.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert problems == []
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert tab.locator("img").count() == 2 * len(found.pictures)
    token = tab.locator(".tokens").first.locator(".t.answer").last
    token.hover()
    said = token.evaluate("node => getComputedStyle(node, '::after').content")
    position = max(index for index, one in enumerate(found.tokens) if one.kind == "answer")
    assert said == f'"id {found.tokens[position].id} · position {position} · supervised"'
    assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert tab.locator(".differs").count() == (2 if name == "two-0" else 0)
    context.close()
