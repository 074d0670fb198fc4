"""Advice that is printed works: every setting that a plan, an error of memory or an alarm names is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mmllm.config import CONFIGS, RunConfig
from mmllm.config.file import with_overrides
from mmllm.runs.alarms import new_alarms
from mmllm.training.memory import Memory, Shape, out_of_memory_text, suggestions
from tests.builders.tiny_runs import settings_of

TRAIN_ALL = ("train=[vision,projector,language]",
             "optim.learning_rates={vision: 0.01, projector: 0.01, language: 0.01}")  # fmt: skip
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a frozen LLM": ("stage1.yaml", ("compute.batch_size=12",)),
    "a frozen LLM in bf16": ("stage1.yaml", ("model.language.dtype=bf16", "compute.precision=bf16")),
    "an LLM trained whole": ("stage2.yaml", ("compute.batch_size=15", "compute.accumulate_steps=2")),
    "all three parts, the tower recomputed": ("stage2.yaml", (*TRAIN_ALL, "compute.gradient_checkpointing=[vision]")),
    "LoRA": ("stage2.yaml", ("lora.rank=4",)),
    "LoRA, replay": ("stage2.yaml", ("lora.rank=4", "data.replay={path: x.json, fraction: 0.1}")),
    "LoRA in 8 bits": ("stage2.yaml", ("lora.rank=4", "lora.quantise=int8")),
    "a layer's kernels": ("stage2.yaml", ("compute.liger=true", "lora.rank=1")),
    "a checkpoint": ("stage2.yaml", ("model={checkpoint: somewhere}",)),
}


def config_of(tiny_runs: Path, out: Path, run: str) -> RunConfig:
    path, overrides = RUNS[run]
    if run == "a checkpoint":
        model = {"checkpoint": "somewhere"}
        config = settings_of(tiny_runs / path, out)
        return CONFIGS["stage2"].model_validate({**config.model_dump(), "model": model})
    return settings_of(tiny_runs / path, out, *overrides)


def apply(config: RunConfig, told: str) -> RunConfig:
    """The settings as a shell passes them on. Raises ConfigError for what is no setting or does not go together."""
    return with_overrides(config, shlex.split(told))


@pytest.mark.parametrize("run", RUNS)
def test_every_change_for_less_memory_can_be_made_on_top_of_those_above(
    run: str, tiny_runs: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_runs, tmp_path, run)
    given = [row.strip().split("  (costs: ") for row in out_of_memory_text(config, MemoryError()).splitlines()]
    settings = [row[0] for row in given if len(row) == 2]
    assert settings == [change.setting for change in suggestions(config)]
    assert len(settings) >= 3
    for told in settings:
        changed = apply(config, told)
        assert changed != config, told
        config = changed
    size = config.compute.batch_size * config.compute.accumulate_steps
    first = config_of(tiny_runs, tmp_path, run)
    assert size == first.compute.batch_size * first.compute.accumulate_steps, "the recipe stays"
    assert config.compute.batch_size == 1
    assert "language" in config.compute.gradient_checkpointing
    assert set(config.compute.gradient_checkpointing) >= set(first.compute.gradient_checkpointing)


def test_qlora_is_advised_where_the_llm_is_trained_and_nowhere_else(tiny_runs: Path, tmp_path: Path) -> None:
    suggested = {run: suggestions(config_of(tiny_runs, tmp_path, run)) for run in RUNS}
    advised = {run for run, some in suggested.items() if any("lora.quantise=nf4" in one.setting for one in some)}
    assert advised == {
        "an LLM trained whole", "all three parts, the tower recomputed", "LoRA", "LoRA, replay", "a checkpoint",
    }  # fmt: skip


def test_what_qlora_saves_is_estimated_from_the_linear_layers(tiny_runs: Path, tmp_path: Path) -> None:
    memory = Memory(28e9, 28e9, 56e9, 40e9)
    shape = Shape(
        language_trained=27e9, language_numbers=6.75e9, language_bytes=4, linear_numbers=6.5e9, num_layers=32,
        layer_inputs=4e9,
    )  # fmt: skip
    config = config_of(tiny_runs, tmp_path, "an LLM trained whole")
    found = {one.setting: one for one in suggestions(config, memory, shape)}
    assert found["model.language.dtype=bf16"].saves == pytest.approx(13.5e9)
    assert found["lora.quantise=nf4"].saves == pytest.approx(6.5e9 * (2 - 0.5625))


def setting_of(path: str, model: Any = CONFIGS["stage2"]) -> bool:
    """Whether there is a setting of this dotted path."""
    for step in path.split("."):
        kinds = [model, *getattr(model, "__args__", ())]
        kinds += [inner for kind in kinds for inner in getattr(kind, "__args__", ())]
        if dict in [getattr(kind, "__origin__", None) for kind in kinds]:
            return True  # a table with keys of its own, such as learning_rates
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None or step not in section.model_fields:
            return False
        model = section.model_fields[step].annotation
    return True


@pytest.mark.parametrize("run", RUNS)
def test_every_setting_that_an_alarm_names_is_one(run: str, tiny_runs: Path, tmp_path: Path) -> None:
    config = config_of(tiny_runs, tmp_path, run)
    rows = [{"step": step, "image_reliance": 0.0, "text_loss": float(step)} for step in range(7)]
    alarms = dict(new_alarms(rows[:2] + rows[-1:], config))
    told = alarms["image_reliance"] + (dict(new_alarms(rows[:2], config))["forgetting"])
    named = re.findall(
        r"\b(?:compute|optim|validation|alarms|data|log|lora|model|train|freeze)\.[a-z_]+(?:\.[a-z_]+)*", told
    )
    assert {"alarms.min_image_reliance", "alarms.forgetting_budget"} < set(named)
    assert [name for name in named if not setting_of(name)] == []
    assert not setting_of("model.language.quantise")


def test_forgetting_is_answered_with_what_this_run_can_change(tiny_runs: Path, tmp_path: Path) -> None:
    rows = [{"step": step, "text_loss": float(step)} for step in range(2)]
    told = {run: dict(new_alarms(rows, config_of(tiny_runs, tmp_path, run)))["forgetting"] for run in RUNS}
    assert "lora.rank=64 in place of training it whole" in told["an LLM trained whole"]
    assert "lower lora.rank (it is 4)" in told["LoRA"]
    assert "in place of" not in told["LoRA"]
    assert "mix in text with data.replay" in told["LoRA"]
    assert "raise data.replay.fraction" in told["LoRA, replay"]
    assert "lora.rank" not in told["a layer's kernels"], "a rank of 1 cannot be lowered"
