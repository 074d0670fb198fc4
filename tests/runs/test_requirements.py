"""What a run computes in where its settings leave it to the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from typer.testing import CliRunner

from mmllm.cli import app
from mmllm.config.file import dump_config
from mmllm.runs.requirements import resolve_precision, slow_precision_text
from mmllm.stages.conversation import ConversationStage
from tests.builders.tiny_runs import losses_of, settings_of, train_in_process

AUTO = ("compute.precision=auto", "optim.max_steps=2", "log.save_every_steps=1")
MULTIPLIES = "mmllm.kernels.precision._cpu_multiplies_bf16"


@pytest.fixture(params=[True, False], ids=["bf16 CPU", "plain CPU"])
def multiplies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(MULTIPLIES, lambda: request.param)
    return bool(request.param)


def test_auto_is_bf16_where_the_cpu_multiplies_in_it(multiplies: bool, tiny_runs: Path, tmp_path: Path) -> None:
    config = settings_of(tiny_runs / "stage2.yaml", tmp_path, *AUTO)
    assert resolve_precision(config).compute.precision == ("bf16" if multiplies else "fp32")
    for given in ("fp32", "bf16"):
        named = settings_of(tiny_runs / "stage2.yaml", tmp_path, f"compute.precision={given}")
        assert resolve_precision(named) is named


def test_a_run_goes_on_in_the_precision_that_it_began_with(multiplies: bool, tiny_runs: Path, tmp_path: Path) -> None:
    config = settings_of(tiny_runs / "stage2.yaml", tmp_path, *AUTO)
    for began in ("fp32", "bf16"):
        begun = settings_of(tiny_runs / "stage2.yaml", tmp_path, *AUTO, f"compute.precision={began}")
        assert resolve_precision(config, dump_config(begun)).compute.precision == began


def test_a_finished_run_of_auto_is_known_on_another_machine(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    monkeypatch.setattr(MULTIPLIES, lambda: False)
    train_in_process(config, out, *AUTO)
    assert OmegaConf.load(out / "config.yaml").compute.precision == "fp32", "what it computed in is on record"
    fp32 = train_in_process(config, tmp_path / "fp32", *AUTO, "compute.precision=fp32")
    assert losses_of(out) == losses_of(fp32)
    monkeypatch.setattr(MULTIPLIES, lambda: True)
    capsys.readouterr()
    train_in_process(config, out, *AUTO)
    assert "is finished" in capsys.readouterr().out


def test_bf16_that_is_slow_here_is_said(multiplies: bool, tiny_runs: Path, tmp_path: Path) -> None:
    asked = settings_of(tiny_runs / "stage2.yaml", tmp_path, "compute.precision=bf16")
    told = slow_precision_text(asked, torch.device("cpu"))
    assert (told is None) == multiplies
    assert told is None or "compute.precision=auto" in told
    assert (
        slow_precision_text(
            resolve_precision(settings_of(tiny_runs / "stage2.yaml", tmp_path, *AUTO)), torch.device("cpu")
        )
        is None
    )
    held = settings_of(tiny_runs / "stage1.yaml", tmp_path, "model.language.dtype=bf16")
    notes = ConversationStage(held).notes
    assert any("this CPU has no instructions for bf16: weights held in it" in note for note in notes) != multiplies
    plan = CliRunner().invoke(
        app, ["plan", str(tiny_runs / "stage2.yaml"), f"out={tmp_path}", "compute.precision=bf16"]
    )
    assert ("no instructions for bf16" in plan.output) != multiplies
