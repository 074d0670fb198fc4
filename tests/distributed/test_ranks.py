"""Several processes: one that hangs or dies ends the others with a word, and the run goes on with the same weights."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from mmllm.runs.state import saved_steps
from tests.builders.launches import forked
from tests.builders.tiny_runs import losses_of, weights_of

# The real command; where DIES says so, the second process hangs at its data in the fifth step, until both processes
# have said that nothing goes on, and then dies by SIGKILL.
DRIVER = """
import os, signal, sys, time
from pathlib import Path
from mmllm.stages import run
from mmllm.training.watchdog import Watchdog
from mmllm.stages.conversation import ConversationStage

folder, rank, calls = Path(os.environ["DIES"]), os.environ["RANK"], 0
whole_text, whole_batch = Watchdog._text, ConversationStage.batch

def text(self, now, waited):
    (folder / f"told-{rank}").touch()
    return whole_text(self, now, waited)

def batch(self, items):
    global calls
    calls += 1
    if folder.name == "dies" and rank == "1" and calls == 5:
        while len(list(folder.glob("told-*"))) < 2:
            time.sleep(0.1)
        time.sleep(0.5)  # what the other process says shall reach the terminal
        os.kill(os.getpid(), signal.SIGKILL)
    return whole_batch(self, items)

Watchdog._text, ConversationStage.batch = text, batch
run.main("stage2", sys.argv[1:])
"""


def launch(folder: Path, config: Path, out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "driver.py").write_text(DRIVER)
    return forked(folder / "driver.py", [config, f"out={out}", *overrides], 2, {"DIES": str(folder)})


@pytest.mark.timeout(900)
def test_a_process_that_hangs_and_dies_is_told_and_the_two_go_on_to_the_same_weights(
    tiny_runs: Path, tmp_path: Path
) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    overrides = ("compute.batch_size=2", "log.save_every_steps=2", "log.stall_seconds=2")
    died = launch(tmp_path / "dies", config, out, *overrides)
    assert died.returncode != 0
    assert "process 1 of 2: no progress for " in died.stderr, died.stderr[-3000:]
    assert " in step 5, waits for data. Examples: " not in died.stderr, "there are none yet"
    assert "process 0 of 2: no progress for " in died.stderr
    assert " in step 5, waits for all processes to have their data. Examples: " in died.stderr
    assert " text-only. It is in " in died.stderr
    assert "error: step 5: another process of this run has ended or cannot be reached;" in died.stderr
    assert [path.name for path in saved_steps(out)] == ["step_0000002", "step_0000004"]
    gone_on = launch(tmp_path / "lives", config, out, *overrides)
    assert gone_on.returncode == 0, gone_on.stderr[-3000:]
    assert "goes on from step 4" in gone_on.stdout
    assert launch(tmp_path / "lives", config, tmp_path / "unbroken", *overrides).returncode == 0
    ours, theirs = weights_of(out), weights_of(tmp_path / "unbroken")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert losses_of(out) == losses_of(tmp_path / "unbroken")


@pytest.mark.timeout(300)
def test_an_alarm_that_shall_fail_the_run_ends_both_processes_with_an_error(tiny_runs: Path, tmp_path: Path) -> None:
    alarms = "alarms={fail: true, min_image_reliance: 100, reliance_after: 0}"
    overrides = (
        "compute.batch_size=2",
        f"data.val=[{{path: {tiny_runs}/data/train.json}}]",
        "validation.every_steps=3",
        alarms,
    )
    ended = launch(tmp_path / "lives", tiny_runs / "stage2.yaml", tmp_path / "out", *overrides)
    assert ended.returncode != 0
    told = "error: the run is saved, but it had alarms (alarms.fail): "
    assert f"{told}the model does not look at the picture" in ended.stderr
    assert f"{told}the first process says which" in ended.stderr
