"""A run that is killed with SIGKILL, at whatever moment, ends in the weights of one that never stopped."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from mmllm.checkpoint.folder import load_checkpoint, verify_files
from mmllm.runs.state import saved_steps
from tests.builders.tiny_runs import log_of, losses_of, streamed, train_and_die, train_in_process, weights_of

# What kills the run, and the states that it leaves: of eight steps, after each second one, and of these the last two.
MOMENTS = {
    "step 2: before the update": [],
    "step 7: before the update": [4, 6],  # in the second epoch
    "rehearsal: before it is read back": [],
    "rehearsal: before sync": [],
    "step_0000004: before sync": [2],
    "step_0000006: before rename": [2, 4],
    "step_0000006: before older states are removed": [2, 4, 6],
    "validation after step 6: begin": [2, 4],
    "validation after step 6: end": [2, 4],
    "checkpoint best: before it is written": [2],
    "checkpoint best: 0 of its files in place": [2],
    "validation after step 8: begin": [4, 6],
    "end: before the last checkpoint": [6, 8],
    "checkpoint out: 2 of its files in place": [6, 8],
    "end: before the states are removed": [6, 8],
}


def overrides_of(data: Path) -> list[str]:
    return [
        "optim.max_steps=8",
        "log.save_every_steps=2",
        "validation.every_steps=3",
        f"data.val=[{{path: {data}/val.json}}]",
    ]


def assert_same(out: Path, unbroken: Path) -> None:
    ours, theirs = weights_of(out), weights_of(unbroken)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert losses_of(out) == losses_of(unbroken)
    assert [row["step"] for row in log_of(out)] == [row["step"] for row in log_of(unbroken)]
    assert verify_files(out) == []
    assert not (out / "state").exists()
    assert (out / "best").exists() == (unbroken / "best").exists()
    if (out / "best").exists():
        best = [load_checkpoint(folder / "best")[0].state_dict() for folder in (out, unbroken)]
        assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])


@pytest.fixture(scope="module")
def unbroken(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    found = {}
    for stage in ("stage1", "stage2"):
        for is_streamed in (False, True):
            out = tmp_path_factory.mktemp("unbroken") / "out"
            more = streamed(tiny_runs / "data") if is_streamed else []
            train_in_process(tiny_runs / f"{stage}.yaml", out, *overrides_of(tiny_runs / "data"), *more)
            found[stage, is_streamed] = out
    return found


@pytest.mark.parametrize("number", range(len(MOMENTS)), ids=MOMENTS)
def test_a_run_killed_at_any_moment_ends_in_the_same_weights(
    tiny_runs: Path, tmp_path: Path, unbroken: dict[tuple[str, bool], Path], number: int
) -> None:
    """Every moment with one of the four kinds of run; the kinds take turns."""
    moment, states = list(MOMENTS.items())[number]
    stage, is_streamed = ("stage2", "stage1")[number % 2], number // 2 % 2 == 1
    config, out = tiny_runs / f"{stage}.yaml", tmp_path / "out"
    overrides = [*overrides_of(tiny_runs / "data"), *(streamed(tiny_runs / "data") if is_streamed else [])]
    assert train_and_die(moment, config, out, *overrides) == -signal.SIGKILL
    assert [int(path.name[5:]) for path in saved_steps(out)] == states
    assert not (out / "manifest.json").exists() or moment == "end: before the states are removed"
    train_in_process(config, out, *overrides)
    assert_same(out, unbroken[stage, is_streamed])
