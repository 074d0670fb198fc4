"""`mmllm train --processes 2`: the same run, shared by two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.builders.tiny_runs import losses_of, train_in_process, weights_of

SETTINGS = ("word_start={steps: 2, num_examples: 16}", "compute.batch_size=4", "optim.max_steps=4", "log.every_steps=1")


def train(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmllm.cli", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)
def test_two_processes_share_each_batch(tiny_runs: Path, tmp_path: Path) -> None:
    done = train(tiny_runs / "stage1.yaml", f"out={tmp_path / 'two'}", *SETTINGS, "--processes", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout
    one = train_in_process(tiny_runs / "stage1.yaml", tmp_path / "one", *SETTINGS)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), rel=1e-5)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(weights_of(tmp_path / "two")[name], value, rtol=0, atol=2e-4)


def test_a_batch_that_cannot_be_shared_and_a_wrong_setting_are_refused(tiny_runs: Path, tmp_path: Path) -> None:
    done = train(tiny_runs / "stage1.yaml", f"out={tmp_path / 'out'}", "compute.batch_size=5", "--processes", 2)
    assert done.returncode == 2
    assert "compute.batch_size: 5 examples are not the same number for each of 2 processes" in done.stderr
    done = train(tiny_runs / "stage1.yaml", f"out={tmp_path / 'out'}", "compute.batch=4", "--processes", 2)
    assert done.returncode == 2
    assert "compute.batch" in done.stderr
    assert not (tmp_path / "out").exists()
