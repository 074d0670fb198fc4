"""A run that is killed, interrupted, out of disk or started twice ends in the weights of one that never stopped."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.checkpoint.folder import load_checkpoint, verify_files
from mmllm.config import ConfigError
from mmllm.errors import is_disk_full
from mmllm.runs.state import StateError, saved_steps
from mmllm.stages.run import main
from mmllm.training import stopping
from mmllm.training.loop import InterruptedRunError
from tests.builders.launches import forked_alone
from tests.builders.stopped_runs import assert_same_run, before_step, interrupt
from tests.builders.tiny_runs import SAMPLES, log_of, losses_of, train_in_process, weights_of

LORA = ("lora.rank=4", "lora.dropout=0.3")

# Runs a stage and does something to its own process as step STEP (from 0) begins.
DRIVER = """
import os, signal, sys
from mmllm.training import loop
from mmllm.stages import run
whole_step = loop.Stepper.run_step
def step(self, number, data):
    if number == {step}:
        os.kill(os.getpid(), signal.{signal})
    return whole_step(self, number, data)
loop.Stepper.run_step = step
run.main("stage2", sys.argv[1:])
"""


def start(config: Path, out: Path, *overrides: str, step: int, signal_name: str) -> subprocess.CompletedProcess[str]:
    driver = out.with_name(f"{out.name}.py")
    driver.write_text(DRIVER.format(step=step, signal=signal_name))
    return forked_alone(driver, [config, f"out={out}", *overrides])


def test_a_killed_run_with_dropout_ends_in_the_same_weights(tiny_runs: Path, tmp_path: Path) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    val = f"data.val=[{{path: {tiny_runs}/data/val.json}}]"
    overrides = [*LORA, "log.save_every_steps=2", "validation.every_steps=3", val]
    killed = start(config, out, *overrides, step=5, signal_name="SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in saved_steps(out)] == ["step_0000002", "step_0000004"]
    assert not (out / "manifest.json").exists()
    train_in_process(config, out, *overrides)
    assert_same_run(out, train_in_process(config, tmp_path / "unbroken", *overrides))
    undropped = train_in_process(config, tmp_path / "undropped", *overrides, "lora.dropout=0")
    assert losses_of(undropped) != losses_of(out), "dropout was at work"


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
def test_an_interrupted_run_goes_on_where_it_stopped(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    override = f"optim.kind={kind}"
    with monkeypatch.context() as patch:
        before_step(patch, 2, interrupt)
        with pytest.raises(
            InterruptedRunError, match="stopped after step 3 of 6; run the same command again to continue"
        ):
            train_in_process(config, out, override)
    assert [path.name for path in saved_steps(out)] == ["step_0000003"]
    assert [row["step"] for row in log_of(out)] == [1, 2, 3]
    train_in_process(config, out, override)
    assert_same_run(out, train_in_process(config, tmp_path / "unbroken", override))
    assert not (out / "state").exists(), "a finished run needs none"


def test_ctrl_c_ends_with_130_and_one_line_and_the_state_is_there(tiny_runs: Path, tmp_path: Path) -> None:
    done = start(tiny_runs / "stage2.yaml", tmp_path / "out", step=1, signal_name="SIGINT")
    assert done.returncode == 130
    assert done.stderr.strip().splitlines()[-1] == (
        "error: stopped after step 2 of 6; run the same command again to continue"
    )
    assert "Traceback" not in done.stderr
    assert [path.name for path in saved_steps(tmp_path / "out")] == ["step_0000002"]


def test_a_second_ctrl_c_is_the_same_one_at_first_and_kills_later(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_runs / "stage2.yaml"

    def twice() -> None:
        interrupt(signal.SIGINT)
        interrupt(signal.SIGINT)

    with monkeypatch.context() as patch:
        before_step(patch, 2, twice)
        with pytest.raises(InterruptedRunError):
            train_in_process(config, tmp_path / "soon")
        patch.setattr(stopping, "SAME_STOP_SECONDS", -1)
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            with pytest.raises(KeyboardInterrupt):
                train_in_process(config, tmp_path / "later")
        finally:
            signal.signal(signal.SIGINT, previous)


def test_only_as_many_states_are_kept_as_asked_for_and_half_written_ones_are_none(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("log.save_every_steps=1", "log.keep_checkpoints=2")
    with monkeypatch.context() as patch:
        before_step(patch, 4, interrupt)
        with pytest.raises(InterruptedRunError):
            train_in_process(tiny_runs / "stage2.yaml", tmp_path, *overrides)
    for name in ("step_0000009", "part_0000006", "step_zero"):
        (tmp_path / "state" / name).mkdir()
    (tmp_path / "state" / "part_0000006" / "state.pt").write_bytes(b"half of it")
    assert [path.name for path in saved_steps(tmp_path)] == ["step_0000004", "step_0000005"]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture
def with_three_states(tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        before_step(patch, 4, interrupt)
        with pytest.raises(InterruptedRunError):
            train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", "log.save_every_steps=2", *THREE)
    assert [path.name for path in saved_steps(tmp_path / "out")] == ["step_0000002", "step_0000004", "step_0000005"]
    return tmp_path / "out"


THREE = ("log.keep_checkpoints=3",)


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, empty])
def test_a_damaged_state_gives_way_to_the_one_before_it(
    tiny_runs: Path, with_three_states: Path, capsys: Any, damage: Any, tmp_path: Path
) -> None:
    config, out = tiny_runs / "stage2.yaml", with_three_states
    damage(out / "state" / "step_0000005" / "state.pt")
    train_in_process(config, out, "log.save_every_steps=3", *THREE)
    told = capsys.readouterr().out
    assert f"passed over: {out / 'state' / 'step_0000005' / 'state.pt'} " in told
    assert "goes on from step 4" in told
    assert_same_run(out, train_in_process(config, tmp_path / "unbroken"))


def test_a_new_state_takes_the_place_of_damaged_ones_and_never_of_the_last_good_one(
    tiny_runs: Path, with_three_states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, one = tiny_runs / "stage2.yaml", with_three_states, "log.keep_checkpoints=1"
    for step in (4, 5):
        flip_a_byte(out / "state" / f"step_000000{step}" / "state.pt")
    before_step(monkeypatch, 2, interrupt)
    with pytest.raises(InterruptedRunError, match="stopped after step 3 of 6"):
        train_in_process(config, out, one)
    assert [path.name for path in (out / "state").iterdir()] == ["step_0000003"]


def test_a_run_whose_states_are_all_damaged_does_not_begin_anew(
    tiny_runs: Path, with_three_states: Path, capsys: Any
) -> None:
    config, out = tiny_runs / "stage2.yaml", with_three_states
    rows = log_of(out)
    for folder, damage in zip(saved_steps(out), (flip_a_byte, cut_short, empty), strict=True):
        damage(folder / "state.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main("stage2", [str(config), f"out={out}"])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: no saved state of {out} can be used:\n  {saved_steps(out)[2] / 'state.pt'} cannot")
    assert len(error.splitlines()) == 5
    assert error.endswith(f"put a copy of one back, or remove {out / 'state'} to begin anew from step 1\n")
    assert (log_of(out), len(saved_steps(out))) == (rows, 3)


@pytest.fixture
def interrupted(tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        before_step(patch, 2, interrupt)
        with pytest.raises(InterruptedRunError):
            train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out")
    return tmp_path / "out"


def test_the_state_of_a_run_with_other_settings_is_refused_and_kept(tiny_runs: Path, interrupted: Path) -> None:
    config, settings = tiny_runs / "stage2.yaml", (interrupted / "config.yaml").read_text()
    with pytest.raises(ConfigError) as caught:
        train_in_process(config, interrupted, "optim.max_steps=9", "seed=4")
    assert str(caught.value) == (
        f"{interrupted} holds a run with other settings:\n  seed: 3 there, 4 here\n  optim.max_steps: 6 there, 9 here\n"
        f"give another out=FOLDER, remove {interrupted} to begin anew, or go on with {interrupted / 'config.yaml'}"
    )
    assert (interrupted / "config.yaml").read_text() == settings
    (interrupted / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"optim.max_steps: 6 there, 9 here"):
        train_in_process(config, interrupted, "optim.max_steps=9")
    assert len(saved_steps(interrupted)) == 1


def test_a_moved_run_may_be_divided_otherwise_but_not_see_other_batches(
    tiny_runs: Path, interrupted: Path, tmp_path: Path
) -> None:
    config, moved = tiny_runs / "stage2.yaml", tmp_path / "moved"
    shutil.move(interrupted, moved)
    with pytest.raises(ConfigError, match="was saved with 4 examples a step, now there are 2; processes x compute"):
        train_in_process(config, moved, "compute.batch_size=2")
    divided = ("compute.batch_size=2", "compute.accumulate_steps=2", "log.every_steps=2", "compute.num_threads=2")
    train_in_process(config, moved, *divided)
    assert load_checkpoint(moved)[2]["kind"] == "vision-language-model"
    torch.set_num_threads(1)


def test_a_finished_run_says_so_and_is_left_alone(tiny_runs: Path, tmp_path: Path, capsys: Any) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    train_in_process(config, out, "optim.max_steps=1")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    main("stage2", [str(config), f"out={out}", "optim.max_steps=1", "log.every_steps=5"])
    assert capsys.readouterr().out == (
        f"{out} is finished: `mmllm chat {out}`. To train it again, remove it or give another out=FOLDER\n"
    )
    with pytest.raises(SystemExit) as ended:
        main("stage2", [str(config), f"out={out}", "optim.max_steps=2"])
    assert ended.value.code == 2
    assert "holds a run with other settings:\n  optim.max_steps: 1 there, 2 here\n" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """As on a full disk, no file of this process can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("full_at", [3, 5], ids=["while a state is saved", "while the checkpoint is saved"])
def test_a_full_disk_is_told_and_what_was_saved_before_is_whole(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, full_at: int
) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    every = "log.save_every_steps=2" if full_at == 3 else "log.save_every_steps=5"
    disk = contextlib.ExitStack()
    with monkeypatch.context() as patch, disk, pytest.raises(SystemExit) as ended:  # noqa: PT012
        before_step(patch, full_at, lambda: disk.enter_context(largest_file(60_000)))
        main("stage2", [str(config), f"out={out}", every])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the disk is full, or a quota or file size limit is reached. What was saved before")
    assert "Traceback" not in error
    assert [path.name for path in saved_steps(out)] == [f"step_000000{2 if full_at == 3 else 5}"]
    assert [path.name for path in (out / "state").iterdir()] == [path.name for path in saved_steps(out)]
    assert not (out / "checkpoint.part").exists()
    assert not (out / "manifest.json").exists()
    train_in_process(config, out, every)
    assert verify_files(out) == []
    assert_same_run(out, train_in_process(config, tmp_path / "unbroken", every))


@pytest.mark.parametrize(
    "more",
    [(), ("log.every_steps=50", "validation.every_steps=3", SAMPLES)],
    ids=["while the log is written", "while samples are written"],
)
def test_a_disk_that_is_too_full_for_small_things_is_told_as_well(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, more: tuple[str, ...]
) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    overrides = ("log.save_every_steps=2", f"data.val=[{{path: {tiny_runs}/data/val.json}}]", *more)
    disk = contextlib.ExitStack()
    with monkeypatch.context() as patch, disk, pytest.raises(SystemExit) as ended:  # noqa: PT012
        before_step(patch, 2, lambda: disk.enter_context(largest_file(100)))
        main("stage2", [str(config), f"out={out}", *overrides])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: the disk is full, or a quota or file size limit is reached.")
    assert [path.name for path in saved_steps(out)] == ["step_0000002"]
    ours = weights_of(train_in_process(config, out, *overrides))
    theirs = weights_of(train_in_process(config, tmp_path / "unbroken", *overrides))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert [row["step"] for row in log_of(out)] == [row["step"] for row in log_of(tmp_path / "unbroken")]


def test_a_run_does_not_begin_where_its_states_have_no_room(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_500_000))
    config, every = tiny_runs / "stage2.yaml", "log.save_every_steps=2"
    fits = train_in_process(config, tmp_path / "fits", every, "log.keep_checkpoints=1")
    assert len(losses_of(fits)) == 6
    with pytest.raises(StateError) as caught:
        train_in_process(config, tmp_path / "out", every, "log.keep_checkpoints=2")
    assert str(caught.value) == (
        f"a saved state takes up to 0.00062 GB, and 0.00186 GB are needed for them in {tmp_path / 'out'}, but "
        "0.0015 GB are free: make room, lower log.keep_checkpoints, or give another out=FOLDER"
    )
    assert losses_of(fits) == losses_of(train_in_process(config, tmp_path / "never saved"))
    assert not (tmp_path / "out" / "log.jsonl").read_text()


def test_a_disk_that_gives_back_other_weights_is_found_before_the_first_step(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def save_otherwise(state: Any, file: Any) -> None:
        first = next(iter(state["weights"]))
        save({**state, "weights": {**state["weights"], first: state["weights"][first] + 1e-6}}, file)

    monkeypatch.setattr(torch, "save", save_otherwise)
    with pytest.raises(StateError, match=r"out differ from those saved, first projector\."):
        train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out")
    assert losses_of(tmp_path / "out") == []
    assert list((tmp_path / "out" / "state").iterdir()) == []


def test_a_cache_that_does_not_fit_on_the_disk_says_so(tiny_runs: Path, tmp_path: Path) -> None:
    overrides = ("data.cache_features=true", "optim.max_steps=1")
    with largest_file(1000), pytest.raises(OSError, match="File too large") as caught:
        train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", *overrides)
    assert is_disk_full(caught.value)
    assert not list((tmp_path / "out").glob("state*"))
