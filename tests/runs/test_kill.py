"""A run that is killed with SIGKILL, at whatever moment, ends in the weights of one that never stopped."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from mmllm.checkpoint.folder import load_checkpoint, verify_files
from mmllm.runs.state import saved_steps
from tests.builders.tiny_runs import log_of, losses_of, streamed, train_in_own_process, train_in_process, weights_of

# A process with this code ends by SIGKILL where a function is called for the `time`-th time, before or behind it.
AT = """
import os, shutil, signal, torch
from pathlib import Path
from mmllm.checkpoint import folder as checkpoint
from mmllm.training import loop
from mmllm.runs import state
from mmllm.stages.conversation import ConversationStage
calls = 0
whole = {function}
def dies(*given, **options):
    global calls
    calls += {counts}
    if calls < {time} or {behind}:
        result = whole(*given, **options)
    if calls == {time}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
{function} = dies
"""


def at(function: str, time: int, *, behind: bool = False, counts: str = "True") -> str:
    return AT.format(function=function, time=time, behind=behind, counts=counts)


# What kills the run, and the states that it leaves: of eight steps, after each second one, and of these the last two.
# The first file that is written, brought to disk and named is the rehearsal's.
MOMENTS = {
    "before the first state": (at("loop.Stepper.make", 2), []),
    "in a step of the second epoch": (at("loop.Stepper.make", 7), [4, 6]),
    "in the rehearsal": (at("state._read", 1), []),
    "as the rehearsal is written": (at("torch.save", 1, behind=True), []),
    "as a state is written": (at("torch.save", 3, behind=True), [2]),
    "before a state is on the disk": (at("os.fsync", 10), [2, 4]),
    "before older states are removed": (at("Path.rename", 4, behind=True), [2, 4, 6]),
    "in a validation": (at("ConversationStage.validate", 3), [2, 4]),
    "behind a validation, before the state": (at("ConversationStage.validate", 3, behind=True), [2, 4]),
    "as the best model is saved": (at("checkpoint._write", 1), [2]),
    "as the best model takes its place": (at("Path.replace", 2, counts="given[0].parent.parent.name == 'best'"), [2]),
    "in the last validation": (at("ConversationStage.validate", 4), [4, 6]),
    "before the final checkpoint": (at("ConversationStage.save", 1, counts="given[1] == out"), [6, 8]),
    "as the final checkpoint takes its place": (
        at("Path.replace", 4, counts="given[0].parent == out / 'checkpoint.part'"), [6, 8],
    ),
    "with the final checkpoint in its place": (at("os.sync", 1, behind=True), [6, 8]),
}  # fmt: skip


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
    code, states = list(MOMENTS.values())[number]
    stage, is_streamed = ("stage2", "stage1")[number % 2], number // 2 % 2 == 1
    config, out = tiny_runs / f"{stage}.yaml", tmp_path / "out"
    overrides = [*overrides_of(tiny_runs / "data"), *(streamed(tiny_runs / "data") if is_streamed else [])]
    assert train_in_own_process(code, config, out, *overrides) == -signal.SIGKILL
    assert [int(path.name[5:]) for path in saved_steps(out)] == states
    assert not (out / "manifest.json").exists() or "in its place" in list(MOMENTS)[number]
    train_in_process(config, out, *overrides)
    assert_same(out, unbroken[stage, is_streamed])
