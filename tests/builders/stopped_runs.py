"""Runs that are stopped as a step begins, and the proof that they end as one that never was."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.training import loop
from tests.builders.tiny_runs import log_of, losses_of, weights_of


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Calls `action` as this step (from 0) of the next run begins."""
    whole_step = loop.Stepper.run_step

    def step(self: Any, current: int, data: Any) -> Any:
        if current == number:
            action()
        return whole_step(self, current, data)

    monkeypatch.setattr(loop.Stepper, "run_step", step)


def interrupt(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def assert_same_run(out: Path, unbroken: Path) -> None:
    ours, theirs = weights_of(out), weights_of(unbroken)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [row["step"] for row in log_of(out)] == [row["step"] for row in log_of(unbroken)]
    assert losses_of(out) == losses_of(unbroken)
