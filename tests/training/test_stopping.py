"""Ctrl-C: a word at once, a validation that is broken off and made later, and nothing lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mmllm.runs.state import saved_steps
from mmllm.training.loop import InterruptedRunError
from mmllm.training.stopping import BrokenOffError, StopSignal
from mmllm.training.validation import Validation
from tests.builders.tiny_runs import log_of, train_in_process, weights_of


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_is_answered_with_what_happens_now(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignal() as stop, stop.during("the model is being saved"):
        interrupt()
        assert stop.received
        assert "stopping: the model is being saved. A second Ctrl-C ends it at once" in capfd.readouterr().err
        interrupt()
        assert capfd.readouterr().err == "", "a launcher's second one says nothing"
    with StopSignal(speaks=False) as stop:
        interrupt()
        assert stop.received
    assert capfd.readouterr().err == "", "one process of a run speaks"


def test_what_may_be_broken_off_ends_at_once_and_the_rest_does_not() -> None:
    ended = []

    def interrupted(stop: StopSignal, *, breaks: bool) -> None:
        with stop.during("what is said", breaks=breaks):
            interrupt()
            ended.append(breaks)

    with StopSignal(speaks=False) as stop:
        with pytest.raises(BrokenOffError):
            interrupted(stop, breaks=True)
        with pytest.raises(BrokenOffError):  # a stop was asked for: it is not begun
            interrupted(stop, breaks=True)
        interrupted(stop, breaks=False)
    assert ended == [False]
    assert not issubclass(BrokenOffError, Exception), "no library swallows it"


def curves(out: Path) -> list[dict[str, Any]]:
    of_speed = {"tokens_per_second", "samples_per_second", "data_wait", "mfu", "hfu"}
    return [{name: row[name] for name in row if name not in of_speed} for row in log_of(out)]


def test_a_validation_that_is_broken_off_is_made_when_the_run_goes_on(tiny_runs: Path, tmp_path: Path) -> None:
    config = tiny_runs / "stage2.yaml"
    val = (f"data.val=[{{path: {tiny_runs}/data/val.json}}]", "validation.every_steps=2", "validation.num_samples=0",
           "optim.max_steps=4")  # fmt: skip
    whole = train_in_process(config, tmp_path / "whole", *val)
    out = tmp_path / "out"
    look, calls, late = Validation._validation_losses, [], []

    def interrupted(self: Validation) -> dict[str, float]:
        found = look(self)
        calls.append(found)
        if len(calls) in (2, 4):  # after step 2; and after step 4, when that after step 2 has been made
            interrupt()
            late.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "_validation_losses", interrupted)
        for step in (2, 4):
            with pytest.raises(
                InterruptedRunError, match=f"stopped after step {step} of 4; run the same command again"
            ):
                train_in_process(config, out, *val)
            assert not late, "it ends where the signal comes"
            assert [path.name for path in saved_steps(out)][-1] == f"step_{step:07d}"
            assert [row["step"] for row in log_of(out) if "val_loss" in row][-1] == step - 2
        train_in_process(config, out, *val)
    assert curves(out) == curves(whole), "each figure once, and the same"
    for name, value in weights_of(whole).items():
        assert value.equal(weights_of(out)[name])
    assert (out / "manifest.json").is_file()
