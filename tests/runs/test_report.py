"""The report of a run: one file that has everything in it, whatever the run came to."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmllm.cli import app
from mmllm.runs.charts import chart, ticks
from mmllm.runs.report import _words, write_report
from mmllm.stages.conversation import ConversationStage
from tests.builders.page_driver import NARROW, WIDE
from tests.builders.tiny_runs import SAMPLES, train_in_process


@pytest.fixture(scope="module")
def done(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two sources, text, a note-free validation at every second step, and an alarm."""
    data = tiny_runs / "data"
    rows = json.loads((data / "train.json").read_text())
    (data / "report.json").write_text(json.dumps(rows[:4]))
    out = tmp_path_factory.mktemp("report") / "run <1>"
    val = f"data.val=[{{path: {data}/report.json}}, {{path: {data}/val.json}}]"
    return train_in_process(
        tiny_runs / "stage2.yaml", out, val, SAMPLES, "validation.every_steps=2", "alarms.min_image_reliance=50"
    )


class Page(HTMLParser):
    """What a page refers to, what its pictures are, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.refers: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refers += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(out: Path) -> Page:
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_a_finished_run_leaves_a_report_with_curves_answers_alarms_versions_and_settings(done: Path) -> None:
    page = page_of(done)
    for text in (
        "run <1>", "finished after 6 of 6 steps", "the model does not look at the picture", "val_loss/report",
        "image_reliance", "text_loss", "forgetting budget", "what is in the picture?", "a red circle", "torch",
        "max_steps: 6",
    ):  # fmt: skip
        assert text in page.text, text
    assert page.tags.count("svg") >= 3


def test_the_report_is_one_file_that_asks_for_nothing(done: Path) -> None:
    page, text = page_of(done), (done / "report.html").read_text()
    assert page.refers
    assert all(place.startswith("data:image/png;base64,") for place in page.refers)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|http-equiv=.refresh", text)
    assert "default-src 'none'" in text


def test_a_sample_shows_how_its_answer_changed(done: Path) -> None:
    steps = (0, 2, 4, 6)
    files = [done / "samples" / f"step_{step:07d}.json" for step in steps]
    told = [json.loads(file.read_text())[0]["answer"] for file in files]
    cell = r"<tr><td class=number>(\d+)<td>(.*?)(?=<tr)"
    rows = re.findall(cell, (done / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert [(int(step), answer) for step, answer in rows[:4]] == [
        (step, _words(answer)) for step, answer in zip(steps, told, strict=True)
    ]


def test_a_stopped_run_has_its_report_too(tiny_runs: Path, tmp_path: Path) -> None:
    calls: list[Any] = []

    def num_tokens(self: ConversationStage, batch: Any) -> int:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return int(batch.attention_mask.sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConversationStage, "num_tokens", num_tokens)
        with pytest.raises(KeyboardInterrupt):
            train_in_process(tiny_runs / "stage1.yaml", tmp_path / "out")
    assert "stopped after 3 of 6 steps" in page_of(tmp_path / "out").text


def test_the_command_writes_the_report_of_a_run_anew_and_refuses_what_is_none(done: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done, tmp_path / "copy")
    (copy / "report.html").unlink()
    result = CliRunner().invoke(app, ["report", str(copy)])
    assert result.exit_code == 0, result.output
    assert "val_loss/report" in page_of(copy).text
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "no run in" in result.output


def test_what_stands_in_data_is_text_in_the_report(done: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done, tmp_path / "copy")
    last = sorted((copy / "samples").glob("*.json"))[-1]
    samples = json.loads(last.read_text())
    samples[0]["answer"] = "<script>alert(1)</script>\x07"
    last.write_text(json.dumps(samples))
    write_report(copy)
    page = page_of(copy)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>�" in page.text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 50, 100]),
        (0, 4, [0, 1, 2, 3, 4]),
        (0.11, 0.32, [0.2, 0.3]),
        (5, 5, [5]),
        (-0.1, 0.1, [-0.1, -0.05, 0, 0.05, 0.1]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_curve_may_be_one_point_constant_or_not_finite() -> None:
    for curve in ([(0, 1.0)], [(0, 2.0), (10, 2.0)], [(0, 1.0), (10, float("nan"))], [(0, float("inf"))]):
        drawn = chart({"loss": curve}, max_step=10)
        assert "nan" not in re.sub(r"not finite", "", drawn)
        assert "inf" not in drawn.replace("finite", "")
    assert "not finite" in chart({"loss": [(0, float("nan"))]}, max_step=10)


@pytest.mark.browser
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_report_can_be_read_in_a_browser_and_asks_for_nothing(
    done: Path,
    browser: Any,
    size: dict[str, int],
) -> None:
    context = browser.new_context(viewport=size)
    tab = context.new_page()
    requests: list[str] = []
    problems: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto((done / "report.html").absolute().as_uri())
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert problems == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"], "nothing stands beside the window"
    curves = [curve for curve in tab.locator("svg").all() if curve.is_visible()]  # the others are folded away
    assert curves
    assert all((box := curve.bounding_box()) and box["width"] > 100 and box["height"] > 50 for curve in curves)
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)"), "pictures stand in the file"
    assert tab.get_by_text("the model does not look at the picture").first.is_visible()
    context.close()
