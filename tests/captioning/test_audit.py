"""The audit of a captioning job: intervals that hold what they promise, and labels that are read with care."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmllm.captioning.audit import audit, draw, prediction_powered_rate, wilson_rate, write_sample
from mmllm.captioning.inputs import FoundPicture
from mmllm.captioning.ledger import JobSettings, Ledger, Outcome
from mmllm.cli import app
from mmllm.errors import MmllmError

SETTINGS = JobSettings("model", "hash", "what?")
NUM = 200


@pytest.mark.parametrize("bad", [0.005, 0.05, 0.3])
@pytest.mark.parametrize(("sensitivity", "false_alarms"), [(0.0, 0.0), (0.5, 0.01), (0.9, 0.1), (1.0, 0.0)])
def test_the_interval_holds_the_true_rate_as_often_as_it_says(
    bad: float, sensitivity: float, false_alarms: float
) -> None:
    generator = np.random.default_rng(0)
    num_captions, num_labels, num_trials, num_held = 5000, 100, 400, 0
    for _ in range(num_trials):
        is_bad = generator.random(num_captions) < bad
        flagged = generator.random(num_captions) < np.where(is_bad, sensitivity, false_alarms)
        chosen = generator.choice(num_captions, num_labels, replace=False)
        pairs = list(zip(is_bad[chosen].tolist(), flagged[chosen].tolist(), strict=True))
        rate = prediction_powered_rate(float(flagged.mean()), num_captions, pairs, confidence=0.95)
        num_held += rate.low <= is_bad.mean() <= rate.high
        assert rate.low <= rate.value <= rate.high
    assert num_held / num_trials > 0.93  # 0.95 with the noise of 400 trials


def test_good_flags_make_the_interval_narrower_than_labels_alone() -> None:
    pairs = [(True, True)] * 29 + [(True, False)] + [(False, False)] * 70
    rate = prediction_powered_rate(0.3, 100_000, pairs)
    alone = wilson_rate(30, 100)
    assert rate.value == pytest.approx(0.31)
    assert (rate.high - rate.low) < 0.5 * (alone.high - alone.low)


def test_the_interval_is_the_papers_but_for_the_added_pair() -> None:
    generator = random.Random(0)
    pairs = [(generator.random() < 0.4, generator.random() < 0.4) for _ in range(20_000)]
    rate = prediction_powered_rate(0.4, 50_000, pairs)
    errors = np.array([int(label) - int(prediction) for label, prediction in pairs])
    margin = 1.959964 * np.sqrt(0.4 * 0.6 / 50_000 + errors.var() / len(errors))
    assert rate.low == pytest.approx(0.4 + errors.mean() - margin, abs=1e-4)
    assert rate.high == pytest.approx(0.4 + errors.mean() + margin, abs=1e-4)


def test_wilsons_interval_is_the_published_one() -> None:
    rate = wilson_rate(81, 263)  # Newcombe 1998, table I: 81 of 263 by method 3
    assert (round(rate.low, 4), round(rate.high, 4)) == (0.2553, 0.3662)


def test_a_draw_takes_each_with_the_same_chance() -> None:
    counts = np.bincount([number for seed in range(2000) for number in draw(iter(range(20)), 5, seed)], minlength=20)
    assert counts.sum() == 10_000
    assert counts.min() > 400
    assert counts.max() < 600
    assert sorted(draw(iter(range(3)), 5, 0)) == [0, 1, 2]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A job of 200 pictures, of which every tenth is flagged."""
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / f"{number:03d}.png" for number in range(NUM)]
    Image.new("RGB", (30, 20), "red").save(paths[0])
    with Ledger(tmp_path / "a.ledger", may_create=True) as opened:
        opened.add([FoundPicture(str(path), path.name) for path in paths], SETTINGS, max_new_tokens=9)
        outcomes = []
        for number, picture in enumerate(opened.take(SETTINGS, NUM)):
            record = {"image": picture.place, "caption": f"<b>caption</b> {number}", "prompt": "what?", "finish": "end"}
            flags = {"flags": ["refusal"]} if number % 10 == 0 else {}
            outcomes.append(Outcome(picture, str(number // 2), None, {**record, **flags}))
        opened.finish(outcomes, SETTINGS)
        yield opened


def label(path: Path, good: str = "yes", bad: str = "no") -> None:
    """Labels as a person would who finds every flag right, and one more bad caption."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    flagged = [row for row in rows if row["caption"].endswith("0")]
    for row in rows:
        row["good"] = bad if row in flagged else good
    next(row for row in rows if row not in flagged)["good"] = bad
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_labels_of_a_sample_give_the_rate_of_the_whole_job(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    assert write_sample(ledger, path, num_pictures=100, seed=3) == 100
    label(path)
    result = audit(ledger, path)
    assert (result.num_labels, result.num_captions, result.missed, result.wrong_flags) == (100, NUM, 1, 0)
    assert result.all_captions.value == pytest.approx(0.89)
    assert result.all_captions.low < 0.89 < result.all_captions.high
    assert result.without_flags is not None
    assert result.without_flags.value > 0.98


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("yes", "perhaps", 1), "line 3: good is 'perhaps'; write yes or no"),
        (lambda text: text.replace("good", "fine", 1), "has no column good"),
        (lambda text: text.replace("caption</b>", "caption", 1), "line 2: .* has another caption or none"),
        (lambda text: text + text.splitlines()[1] + "\n", "is labelled twice"),
        (lambda text: text.replace("yes", "").replace("no", ""), "has 0 labels; at least 10 are needed"),
    ],
)
def test_labels_that_cannot_be_right_are_refused(ledger: Ledger, tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "labels.csv"
    write_sample(ledger, path, num_pictures=50, seed=0)
    label(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(MmllmError, match=message):
        audit(ledger, path)


def test_a_sample_is_never_written_over_labels(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("labels")
    with pytest.raises(MmllmError, match="exists, and may hold labels"):
        write_sample(ledger, tmp_path / "labels.csv", num_pictures=5, seed=0)


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["caption", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_the_commands_that_look_at_a_ledger(ledger: Ledger, tmp_path: Path) -> None:
    status, said, _ = run("status", ledger.path)
    assert status == 0
    assert "200 pictures in" in said
    assert "flagged           20   10.0%" in said
    assert "refusal    20 (says that it cannot or will not answer)" in said
    assert "200 pictures have the same bytes as another (100 groups" in said
    assert f"process {os.getpid()} on" in said
    assert run("audit", ledger.path, "--out", tmp_path / "labels.csv", "--sample", 60)[0] == 0
    label(tmp_path / "labels.csv", good="1", bad="0")
    status, said, _ = run("audit", ledger.path, "--labels", tmp_path / "labels.csv", "--confidence", 0.9)
    assert status == 0
    assert "60 labels of 200 captions, intervals of 90% confidence" in said
    assert "1 bad without a flag, 0 good with one" in said
    status, said, _ = run("export", ledger.path, "--format", "parquet", "--out", tmp_path / "a.parquet")
    assert (status, "200 captions of" in said) == (0, True)


def test_the_report_shows_flagged_pictures_and_some_at_random(ledger: Ledger, tmp_path: Path) -> None:
    status, _, err = run("report", ledger.path, "--out", tmp_path / "report.html", "--pictures", 4)
    assert status == 0, err
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 8  # four that are flagged, four at random
    assert "<h2>refusal <small>20: " in page
    assert "&lt;b&gt;caption&lt;/b&gt;" in page
    assert "<b>caption</b>" not in page
    assert "no image file at" in page  # most of these pictures are not there
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("status", "{folder}/gone.ledger"), 1, "there is no ledger at"),
        (("audit", "{ledger}"), 2, "give --out FILE.csv to draw captions to label, or --labels"),
        (("audit", "{ledger}", "--out", "{folder}/a", "--labels", "{folder}/a"), 2, "give --out FILE.csv"),
        (("audit", "{ledger}", "--labels", "{folder}/gone.csv"), 1, "gone.csv: No such file"),
        (("audit", "{ledger}", "--labels", "{folder}/a.ledger"), 1, "a.ledger"),
        (("audit", "{ledger}", "--out", "{folder}/a", "--sample", "0"), 2, "Invalid value for '--sample'"),
        (("export", "{ledger}", "--out", "{folder}/a", "--format", "yaml"), 1, "--format yaml is not known"),
        (("export", "{ledger}", "--out", "{folder}", "--format", "llava"), 1, "is a folder or a device"),
        (("report", "{ledger}", "--out", "{folder}/in"), 1, "in is a folder"),
    ],
)
def test_wrong_use_is_one_message(
    ledger: Ledger, tmp_path: Path, arguments: tuple[str, ...], exit_code: int, message: str
) -> None:
    places = {"folder": tmp_path, "ledger": ledger.path}
    status, _, err = run(*(text.format(**places) for text in arguments))
    assert status == exit_code
    assert message in err
    assert "Traceback" not in err


def test_an_empty_ledger_has_nothing_to_show(tmp_path: Path) -> None:
    Ledger(tmp_path / "new.ledger", may_create=True).close()
    for arguments in (("audit", "--out"), ("export", "--format", "llava", "--out"), ("report", "--out")):
        status, _, err = run(arguments[0], tmp_path / "new.ledger", *arguments[1:], tmp_path / "x")
        assert (status, "error: " in err) == (1, True)
    assert "0 pictures" in run("status", tmp_path / "new.ledger")[1]
