"""`mmllm plan` and what a run says that is out of memory: the same advice, from what the run really needs."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmllm.cli import app
from mmllm.config import ConfigError
from mmllm.errors import _explain, is_out_of_memory
from mmllm.stages.plan import parse_size
from mmllm.training.memory import Memory, Shape, peak_bytes, reset_peak, size_text, suggestions
from mmllm.training.step import Stepper
from tests.builders.launches import commanded
from tests.builders.tiny_runs import settings_of


def leave_little_memory() -> None:
    """As much address space as the libraries take, and little more; the batch needs gigabytes."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 700_000_000,) * 2)


def plan_of(*arguments: str) -> tuple[int, dict[str, object]]:
    done = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, json.loads(done.stdout[done.stdout.index("{") :])


def test_a_plan_says_what_the_run_needs_and_writes_nothing(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, peaks = tmp_path / "runs" / "out", []

    def watched() -> int:
        peaks.append(peak_bytes())
        return peaks[-1]

    monkeypatch.setattr("mmllm.stages.plan.peak_bytes", watched)
    code, plan = plan_of(str(tiny_runs / "stage2.yaml"), f"out={out}")
    assert (code, plan["fits"]) == (0, True)
    assert not out.parent.exists()
    memory = plan["memory"]
    assert isinstance(memory, dict)
    assert memory["optimizer"] == pytest.approx(2 * memory["gradients"], rel=0.01), "AdamW keeps two averages"
    assert memory["weights"] >= memory["gradients"] > 0
    assert memory["activations"] > 0
    parts = ("weights", "gradients", "optimizer", "activations", "process")
    assert memory["total"] == sum(memory[name] for name in parts)
    if torch.accelerator.is_available():
        assert memory["process"] == 0
    else:
        assert memory["total"] == max(peaks), "of the plan's own loading and steps"
        assert memory["total"] > 1.5e8, "python and torch alone take more"
    speed = plan["speed"]
    assert isinstance(speed, dict)
    assert speed["tokens_per_second"] > speed["samples_per_second"] > 0
    assert 0 < speed["mfu"] <= speed["hfu"] <= 1


@pytest.mark.parametrize(("max_steps", "timed"), [(6, [1, 2]), (2, [1]), (1, [0])])
def test_the_speed_of_a_plan_is_that_of_steps_behind_the_longest_batch(
    max_steps: int, timed: list[int], tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    make = Stepper.step

    def recorded(self: Stepper, step: int, data: Any) -> Any:
        steps.append(step)
        return make(self, step, data)

    monkeypatch.setattr(Stepper, "step", recorded)
    plan_of(str(tiny_runs / "stage2.yaml"), f"out={tmp_path / 'out'}", f"optim.max_steps={max_steps}")
    assert steps == [0, 1, *timed], "the longest batch twice, and then some of the run's own"


def test_a_plan_that_does_not_fit_there_ends_with_1_and_says_what_does(tiny_runs: Path, tmp_path: Path) -> None:
    code, plan = plan_of(str(tiny_runs / "stage2.yaml"), f"out={tmp_path / 'out'}", "--memory", "1MB", "--gpus", "2")
    assert (code, plan["fits"]) == (1, False)
    found = plan["changes"]
    assert isinstance(found, list)
    assert found[0]["setting"] == "compute.gradient_checkpointing=true"
    assert found[1]["setting"] == "compute.batch_size=2 compute.accumulate_steps=2"
    assert [one["left"] for one in found] == sorted((one["left"] for one in found), reverse=True)


def test_smaller_batches_and_checkpointing_save_what_is_estimated_roughly(tiny_runs: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'out'}"
    whole = plan_of(str(tiny_runs / "stage2.yaml"), out)[1]["memory"]
    half = plan_of(str(tiny_runs / "stage2.yaml"), out, "compute.batch_size=2", "compute.accumulate_steps=2")[1][
        "memory"
    ]
    kept = plan_of(str(tiny_runs / "stage2.yaml"), out, "compute.gradient_checkpointing=true")[1]["memory"]
    assert isinstance(whole, dict)
    assert isinstance(half, dict)
    assert isinstance(kept, dict)
    assert half["activations"] == pytest.approx(whole["activations"] / 2, rel=0.2)
    assert kept["activations"] < 0.7 * whole["activations"]


def test_advice_is_in_the_order_of_least_loss_and_adds_up(tiny_runs: Path, tmp_path: Path) -> None:
    config = settings_of(tiny_runs / "stage2.yaml", tmp_path)
    memory, shape = Memory(28e9, 28e9, 56e9, 40e9), Shape(27e9, 6.75e9, 4, 6.5e9, 32, 4e9)
    found = suggestions(config, memory, shape)
    assert memory.total - sum(change.saves or 0 for change in found) == pytest.approx(found[-1].left)
    names = [change.setting.split("=")[0] for change in found]
    assert names.index("compute.gradient_checkpointing") < names.index("compute.precision") < names.index("lora.rank")
    done = settings_of(tiny_runs / "stage2.yaml", tmp_path, "compute.gradient_checkpointing=true", "lora={rank: 4}")
    assert not {"compute.gradient_checkpointing", "lora.rank"} & {
        one.setting.split("=")[0] for one in suggestions(done)
    }


def test_a_run_without_memory_says_what_to_change(tiny_runs: Path, tmp_path: Path) -> None:
    train = f"data.train=[{{path: {tiny_runs}/data/train.json, weight: 800}}]"
    given = (f"out={tmp_path / 'out'}", train, "compute.batch_size=8192")
    done = commanded("train", tiny_runs / "stage2.yaml", *given, before=leave_little_memory)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "error: out of memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert "compute.batch_size=4096 compute.accumulate_steps=2" in done.stderr
    assert done.stderr.index("compute.gradient_checkpointing=true") < done.stderr.index("lora.rank=")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_commands_that_answer_get_advice_of_their_own(error: Exception) -> None:
    assert is_out_of_memory(error)
    explained = _explain(error)
    assert explained is not None
    assert "--device" in explained[0]
    assert "optim." not in explained[0]
    assert not is_out_of_memory(RuntimeError("a shape is wrong"))


def test_sizes_are_read_and_written() -> None:
    assert (parse_size("24GB"), parse_size("512 MiB"), parse_size("1e3")) == (24 * 10**9, 512 * 10**6, 1000)
    assert (size_text(1_179_648), size_text(658e9)) == ("1.18 MB", "658 GB")
    with pytest.raises(ConfigError, match="--memory: 'much' is not a size"):
        parse_size("much")


def test_the_peak_is_that_of_what_follows() -> None:
    reset_peak()
    before = peak_bytes()
    values = torch.ones(25_000_000)
    assert peak_bytes() >= before + 0.9 * values.nbytes
    del values
    if sys.platform == "linux":
        reset_peak()
        assert peak_bytes() < before + 5e7


def test_a_plan_counts_the_validation_with_its_tasks(tiny_runs: Path, tiny_scenes: Path, tmp_path: Path) -> None:
    data = f"data.val=[{{path: {tiny_runs}/data/val.json}}]"
    code, plan = plan_of(
        str(tiny_runs / "stage1.yaml"), f"out={tmp_path / 'out'}", data, f"validation.tasks=[{tiny_scenes}/val]"
    )
    assert code == 0
    assert "the time of validations is not counted" in plan["notes"]  # type: ignore[operator]
    assert not (tmp_path / "out").exists()
