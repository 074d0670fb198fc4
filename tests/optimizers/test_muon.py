"""What Muon takes: the matrices between hidden layers, of every LLM and tower, chosen by the modules that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import model as open_clip_model
from torch import nn

from mmllm.config import LoraConfig, OptimConfig
from mmllm.model.build import build_model
from mmllm.optimizers.layers import hidden_matrices
from mmllm.optimizers.muon import Float32Muon, build_muon
from mmllm.optimizers.optim import build_optimizers
from mmllm.training.lora import add_lora
from mmllm.warmup.attention_guidance import ReadOut
from tests.builders.tiny import CLIP, model_config
from tests.builders.tiny_backbones import BACKBONES, make_backbone_parts
from tests.builders.towers import TOWERS

ATTENTION, GATED = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
# LLM -> the modules of a layer whose weights Muon takes, by their last name
MATRICES: dict[str, set[str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"), ATTENTION | GATED),
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "mixtral": ATTENTION,  # its experts are tensors of three dimensions, and its router is a table
    "mamba": {"in_proj", "x_proj", "dt_proj", "out_proj"},
    "mamba2": {"in_proj", "out_proj"},
    "mpt": {"Wqkv", "out_proj", "up_proj", "down_proj"},
    **{kind: {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"} for kind in ("bloom", "falcon")},
}


def names_of(model: nn.Module, chosen: set[int]) -> list[str]:
    return [name for name, parameter in model.named_parameters() if id(parameter) in chosen]


@pytest.mark.parametrize("kind", BACKBONES)
def test_of_every_llm_muon_takes_the_linear_layers_within_its_layers(
    kind: str, tiny_parts: Path, tmp_path: Path
) -> None:
    model: Any = build_model(make_backbone_parts(tmp_path, kind, tiny_parts))[0].language_model
    names = names_of(model, hidden_matrices(model))
    assert {name.split(".")[-2] for name in names} == MATRICES[kind]
    assert len(names) == 2 * len({name.split(".0.", 1)[1] for name in names if ".0." in name}), "of both layers"
    assert all(name.endswith(".weight") for name in names)


def test_nothing_else_is_decayed_than_before_but_a_state_space(tiny_parts: Path, tmp_path: Path) -> None:
    model: Any = build_model(make_backbone_parts(tmp_path, "mamba", tiny_parts))[0].language_model
    named = list(model.named_parameters())
    config = OptimConfig(learning_rates={"language": 0.01}, max_steps=1, weight_decay=0.1)
    (optimizer,) = build_optimizers(model, {"language": named}, config)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in named if p.ndim >= 2 and id(p) not in decayed} == {
        f"backbone.layers.{layer}.mixer.A_log" for layer in range(2)
    }
    assert all(p.ndim >= 2 for _, p in named if id(p) in decayed)


@pytest.mark.parametrize("kind", TOWERS)
def test_of_every_tower_muon_takes_matrices_within_its_layers(kind: str) -> None:
    tower = TOWERS[kind]()
    chosen = hidden_matrices(tower)
    inside = {id(parameter) for block in tower.blocks() for parameter in block.parameters()}
    assert chosen <= inside
    left = [
        name for name, p in tower.named_parameters()
        if id(p) in inside and id(p) not in chosen and p.ndim == 2 and name.endswith("weight")
    ]  # fmt: skip
    assert not left, "every matrix of a layer that is a weight"
    assert chosen


def test_adapters_are_matrices_and_heads_and_the_vectors_of_added_tokens_are_not(tiny_parts: Path) -> None:

    model: Any = build_model(model_config(tiny_parts))[0]
    add_lora(model, LoraConfig(rank=2, dora=True))
    trained = {id(p) for p in model.language_model.parameters() if p.requires_grad}
    names = names_of(model, hidden_matrices(model) & trained)
    assert names
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert not hidden_matrices(ReadOut(1, 8, 16))


def test_position_tables_and_patches_are_learnt_by_adamw() -> None:

    torch.manual_seed(0)
    clip = open_clip_model.CLIP(**CLIP)
    names = names_of(clip, hidden_matrices(clip))
    ends = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert len(names) == 3 * len(ends)
    assert all(name.endswith(ends) for name in names)


SHAPES = [(8, 8), (24, 8), (8, 24), (8, 8), (3, 40)]


def stepped(
    kind: Any, num_steps: int, state: dict[str, Any] | None = None
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Weights and state behind some steps with gradients that differ from step to step, from a state or from none."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = kind([{"params": weights[:3], "lr": 0.1}, {"params": weights[3:], "lr": 0.02}], weight_decay=0.1)
    if state:
        optimizer.load_state_dict(state)
    for _ in range(num_steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return [weight.detach() for weight in weights], optimizer.state_dict()


def test_muon_in_fp32_is_torchs_but_for_the_rounding_of_bf16() -> None:
    begun, _ = stepped(torch.optim.Muon, 0)
    (theirs, their_state), (ours, our_state) = stepped(torch.optim.Muon, 5), stepped(Float32Muon, 5)
    for own, other, start in zip(ours, theirs, begun, strict=True):
        assert float((own - other).norm()) < 0.05 * float((other - start).norm())
    assert our_state["param_groups"] == their_state["param_groups"]
    for number, own in our_state["state"].items():
        torch.testing.assert_close(own, their_state["state"][number])
    for kind, state in ((torch.optim.Muon, our_state), (Float32Muon, their_state)):
        stepped(kind, 1, state)  # each goes on from the other's state


def test_a_matrix_without_a_gradient_stays_as_it_is() -> None:
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = Float32Muon([{"params": weights, "lr": 0.1}])
    weights[0].grad = torch.eye(4)
    optimizer.step()
    assert not weights[0].equal(torch.ones(4, 4))
    assert weights[1].equal(torch.ones(4, 4))


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_cpu_that_multiplies_in_bf16_keeps_torchs_own(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmllm.kernels.precision._cpu_multiplies_bf16", lambda: multiplies)
    built = build_muon([{"params": [nn.Parameter(torch.ones(4, 4))], "lr": 0.1}], weight_decay=0.0)
    assert type(built) is (torch.optim.Muon if multiplies else Float32Muon)
