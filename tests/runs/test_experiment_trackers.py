"""Trackers get the figures of the log, once each, as one curve however often the run was stopped."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmllm.config import ConfigError, LogConfig
from mmllm.runs.experiment_trackers import EXTRAS
from mmllm.runs.run_log import RunLog
from mmllm.stages.run import run
from tests.builders.launches import Forked
from tests.builders.tiny_runs import settings_of

EXPECTED = [(step, 1.0 + step) for step in range(1, 7)]


def stop_and_resume(out: Path, name: str) -> None:
    """Steps 1 to 4, then a start from a state of step 2, as after a crash."""
    for first, last in ((0, 4), (2, 6)):
        one = RunLog(out, max_steps=6, first_step=first, is_main=True, trackers=[name], settings={"seed": 3})
        for step in range(first + 1, last + 1):
            one.log(step, {"loss": 1.0 + step})
            if step == 4:
                one.alarm(step, "image_reliance", "words are for the log")
        one.close()


def in_tensorboard(out: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def records(data: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format behind a header of 7 bytes, here all in the first block."""
    place = 7
    while place + 7 <= min(len(data), 2**15):
        size, is_whole = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6] == 1
        assert is_whole
        yield data[place + 7 : place + 7 + size]
        place += 7 + size


def in_wandb(out: Path) -> list[tuple[int, float]]:
    """Both starts in the files that `wandb sync` sends, under one id."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted((out / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len({path.name for path in files}) == 1, "one id"
    found = []
    for path in files:
        for data in records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found.append((values["_step"], values["loss"]))
    return found


def in_trackio(out: Path) -> list[tuple[int, float]]:
    [file] = out.glob("*.db")
    with sqlite3.connect(file) as base:
        found = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in found}) == 1
    return [(step, json.loads(values)["loss"]) for _, step, values in found]


READ: dict[str, Callable[[Path], list[tuple[int, float]]]] = {
    "tensorboard": in_tensorboard, "wandb": in_wandb, "trackio": in_trackio,
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRAS)
def test_a_tracker_gets_every_figure_once_though_the_run_was_stopped(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    told = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path)}
    with Forked(stop_and_resume, given=(tmp_path, name), environment=told) as process:  # trackers leave threads
        done = process.completed()
    assert done.returncode == 0, done.stderr
    assert READ[name](tmp_path) == EXPECTED


@pytest.mark.parametrize("name", EXTRAS)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_loads(
    name: str, tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm.runs.experiment_trackers.find_spec", lambda asked: None)
    config = settings_of(tiny_runs / "stage1.yaml", tmp_path / "out", f"log.trackers=[{name}]")
    with pytest.raises(
        ConfigError, match=rf"log\.trackers: {name} is not installed; pip install 'mmllm\[{EXTRAS[name]}\]'"
    ):
        run(config)
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="tensorboard"):
        LogConfig.model_validate({"trackers": ["tensorbord"]})
