"""Adapters of other kinds, and on an LLM in few bits: only its layers are quantised, and the adapter outlives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mmllm.checkpoint.folder import read_manifest
from mmllm.checkpoint.merge import merge_checkpoint
from mmllm.config import ConfigError
from mmllm.model.build import build_model
from mmllm.stages.conversation import ConversationStage
from mmllm.training.quantised_base import quantise_language
from tests.builders.conversations import ask
from tests.builders.tiny_backbones import make_backbone_parts
from tests.builders.tiny_runs import log_of, losses_of, settings_of, train_in_process, weights_of

LORA = ("lora.rank=4", "lora.alpha=8")


def stage_of(tiny_runs: Path, out: Path, *overrides: str) -> ConversationStage:
    return ConversationStage(settings_of(tiny_runs / "stage2.yaml", out, *LORA, *overrides))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_llm_s_layers_are_quantised_and_nothing_else(kind: str, tiny_runs: Path, tmp_path: Path) -> None:
    plain = stage_of(tiny_runs, tmp_path).model
    model = stage_of(tiny_runs, tmp_path, f"lora.quantise={kind}").model
    small = {name for name, p in model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert small == {name for name, _ in plain.named_parameters() if ".base_layer.weight" in name}
    assert len(small) == 2 * 7
    for part in (model.vision_tower, model.projector, model.get_output_embeddings()):
        assert {type(module).__module__.split(".")[0] for module in part.modules()} <= {"torch", "open_clip", "mmllm",
                                                                                        "projector"}  # fmt: skip
    held = {name: sum(p.nbytes for p in m.language_model.get_decoder().layers.parameters() if not p.requires_grad)
            for name, m in (("plain", plain), ("few bits", model))}  # fmt: skip
    assert held["few bits"] < held["plain"] / (6 if kind == "nf4" else 3.5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("backbone", ["llama", "qwen2"])
def test_every_adapter_gets_its_gradient_after_an_answer_too(
    kind: str, backbone: str, tiny_runs: Path, tiny_parts: Path, tmp_path: Path
) -> None:
    language = make_backbone_parts(tmp_path / "parts", backbone, tiny_parts).language
    assert language
    stage = stage_of(tiny_runs, tmp_path, f"lora.quantise={kind}", f"model.language.source={language.source}")
    for name, parameter in stage.parts["language"]:
        if "lora_B" in name:  # begins with zeros, so that A would get no gradient
            nn.init.normal_(parameter, std=0.1)
    gradients = []
    for _ in range(2):
        stage.model.zero_grad()
        stage.module(stage.batch(range(4))).backward()
        assert [name for name, p in stage.parts["language"] if p.grad is None or not p.grad.any()] == []
        gradients.append({name: p.grad.clone() for name, p in stage.parts["language"] if p.grad is not None})
        stage.validation.examples = [stage.examples[number] for number in range(2)]
        assert stage.validate(1)["val_loss"] > 0  # a forward in eval mode, and answers
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


VARIANTS = ["lora.quantise=nf4", "lora.quantise=int8", "lora.dora=true", "lora.rslora=true",
            "lora={rank: 4, dora: true, quantise: nf4}"]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_adapter_is_learnt_saved_and_merged_into_full_precision(
    variant: str, tiny_runs: Path, tmp_path: Path
) -> None:
    base = dict(build_model(settings_of(tiny_runs / "stage2.yaml", tmp_path).model)[0].state_dict())
    val = (f"data.val=[{{path: {tiny_runs}/data/val.json}}]", "validation.every_steps=2", "optim.max_steps=4")
    run = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "run", *LORA, variant, *val)
    curve = [row["val_loss"] for row in log_of(run) if "val_loss" in row]
    assert curve[-1] < curve[0]
    assert not [name for name in weights_of(run) if name.startswith("language_model.")], "the adapter alone"
    assert read_manifest(run)["base"]["kind"] == "language"
    merge_checkpoint(run, tmp_path / "merged")  # proves the golden answers before and after
    assert ask(tmp_path / "merged") == ask(run)
    merged = weights_of(tmp_path / "merged")
    assert {value.dtype for value in merged.values()} == {torch.float32}
    moved = {name for name in base if name.startswith("language_") and not torch.equal(base[name], merged[name])}
    assert moved == {name for name in base if ".layers." in name and "_proj." in name}


def test_four_bits_go_on_from_a_checkpoint_and_learn_what_full_precision_does(
    tiny_runs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    import yaml

    settings = yaml.safe_load((tiny_runs / "stage2.yaml").read_text())
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "model": {"checkpoint": str(tiny_checkpoint)}}))
    few, full = (
        train_in_process(path, tmp_path / name, *LORA, *more, "optim.max_steps=3", "compute.precision=bf16")
        for name, more in (("few", ["lora.quantise=nf4"]), ("full", []))
    )
    assert losses_of(few) == pytest.approx(losses_of(full), rel=0.25)
    assert losses_of(few) != losses_of(full)
    merge_checkpoint(few, tmp_path / "merged")


@pytest.mark.parametrize(
    ("kind", "message"), [("gpt2", "has no linear layers that bitsandbytes can hold"), ("mamba", "past its layers")]
)
def test_an_llm_without_layers_to_quantise_is_named(kind: str, message: str, tiny_parts: Path, tmp_path: Path) -> None:
    model = build_model(make_backbone_parts(tmp_path, kind, tiny_parts))[0].language_model
    with pytest.raises(ConfigError, match=message):
        quantise_language(model, "nf4", compute_dtype=torch.float32)


def test_a_tower_is_not_quantised(tiny_runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vision_lora\.quantise"):
        settings_of(tiny_runs / "stage2.yaml", tmp_path, "vision_lora={quantise: nf4}")
