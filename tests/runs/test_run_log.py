"""What a run tells: lines that a program can read, and no line twice after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmllm.runs.run_log import RunLog, metric_curves

LOG_FILE = "log.jsonl"


def tracker(out: Path, *, first_step: int = 0, is_main: bool = True) -> RunLog:
    return RunLog(out, max_steps=10, first_step=first_step, is_main=is_main)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]


def test_every_row_is_on_disk_at_once_with_enough_digits(tmp_path: Path, capsys: Any) -> None:
    one = tracker(tmp_path)
    one.log(1, {"loss": 2.3456789, "learning_rate": 1.23e-8}, seconds_left=90)
    assert rows(tmp_path) == [{"step": 1, "loss": 2.34568, "learning_rate": 1.23e-8}]
    told = capsys.readouterr().out
    for text in ("step 1/10", "loss 2.346", "1.23e-08", "left 1.5 min"):
        assert text in told


def test_rows_behind_the_step_that_a_run_goes_on_from_are_dropped(tmp_path: Path) -> None:
    one = tracker(tmp_path)
    for step in (1, 2, 3, 4):
        one.log(step, {"loss": 1.0 / step})
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 5, "lo')  # the power went here
    two = tracker(tmp_path, first_step=3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    two.log(4, {"loss": 0.5})
    assert [row["step"] for row in two.rows] == [1, 2, 3, 4]
    assert rows(tmp_path) == two.rows


def test_only_the_main_process_speaks(tmp_path: Path, capsys: Any) -> None:
    silent = tracker(tmp_path, is_main=False)
    silent.say("hello")
    silent.log(1, {"loss": 1.0})
    silent.finish()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_end_is_a_plot_and_a_table_of_first_and_last(tmp_path: Path, capsys: Any) -> None:
    one = tracker(tmp_path)
    one.log(1, {"loss": 4.0, "grad_norm": 1.0})
    one.log(2, {"loss": 2.0, "grad_norm": 1.0})
    one.log(2, {"val_loss": 3.0})
    one.finish()
    told = capsys.readouterr().out
    assert (tmp_path / "train_loss.png").stat().st_size > 5000
    for text in ("loss", "val loss", "first", "last", "steps"):
        assert text in told
    assert "grad norm" not in told


def test_a_run_that_begins_anew_keeps_no_line_of_an_earlier_one(tmp_path: Path) -> None:
    tracker(tmp_path).log(0, {"val_loss": 5.0})
    tracker(tmp_path).log(0, {"val_loss": 4.0})
    assert rows(tmp_path) == [{"step": 0, "val_loss": 4.0}]


def test_an_alarm_is_loud_and_stands_in_the_log_but_in_no_table_of_figures(tmp_path: Path, capsys: Any) -> None:
    one = tracker(tmp_path)
    one.log(1, {"loss": 4.0})
    one.alarm(1, "image_reliance", "it does not look [at] the picture")
    assert "ALARM at step 1: it does not look [at] the picture" in capsys.readouterr().out
    assert one.alarms == [{"step": 1, "alarm": "image_reliance", "text": "it does not look [at] the picture"}]
    assert rows(tmp_path) == one.rows
    assert metric_curves(one.rows) == {"loss": [(1, 4.0)]}
    one.finish()
    assert "│ alarm" not in capsys.readouterr().out
    assert tracker(tmp_path, first_step=1).alarms == one.alarms, "a run that goes on has had it"
