"""What is tried on an LLM is decided by what it does, not by how far bf16 rounds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mmllm.model import capabilities
from mmllm.model.capabilities import has_plain_head, needs_mask, why_not_packed
from mmllm.model.probing import held_in_float32, probing
from mmllm.training.quantised_base import quantise_language
from tests.builders.sharp import rounding, sharp_llama
from tests.builders.tiny_backbones import BACKBONES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backbone(kind: str, **changes: Any) -> Any:
    ids = {"vocab_size": 64, "bos_token_id": None, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BACKBONES[kind], **ids, **changes})).eval()


def test_what_packs_in_fp32_packs_in_16_bits_however_much_they_round() -> None:
    model = sharp_llama()
    assert rounding(model) < 1e-4
    for dtype in DTYPES:
        model.to(dtype)
        assert why_not_packed(model) is None, dtype
        assert has_plain_head(model)
        assert not needs_mask(model)
    model.to(torch.bfloat16)
    assert rounding(model) > 0.1, "or this LLM is none that a tolerance would refuse"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["opt", "mamba", "mamba2"])
def test_an_llm_that_reads_its_neighbours_is_found_out_in_every_precision(kind: str, dtype: torch.dtype) -> None:
    assert "logits change by" in str(why_not_packed(backbone(kind).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "mixtral", "qwen3", "phi3"])
def test_other_llms_are_judged_in_16_bits_as_in_fp32(kind: str, dtype: torch.dtype) -> None:
    model = backbone(kind)
    in_full = why_not_packed(model), has_plain_head(model), needs_mask(model)
    model.to(dtype)
    assert (why_not_packed(model), has_plain_head(model), needs_mask(model)) == in_full
    assert in_full == (None, kind != "gemma2", False)  # which caps its logits


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_few_bits_that_compute_in_bf16_are_packed(kind: str) -> None:
    model = sharp_llama()
    quantise_language(model, kind, compute_dtype=torch.bfloat16)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert why_not_packed(model) is None
        assert has_plain_head(model)
        assert not needs_mask(model)


def test_a_probe_leaves_no_trace_of_modes_gradients_or_numbers() -> None:
    model = sharp_llama().to(torch.bfloat16).train()
    model.model.norm.eval()  # as a frozen part is while the rest is trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with probing(model), held_in_float32(model):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[100_000]]))
    assert torch.is_grad_enabled()
    assert [module for module in model.modules() if not module.training] == [model.model.norm]
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())


def test_tied_weights_stay_tied_in_fp32() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)}).to(torch.bfloat16)
    model["b"].weight = model["a"].weight
    with held_in_float32(model):
        assert model["a"].weight is model["b"].weight
        assert model["b"].weight.dtype == torch.float32
    assert model["b"].weight.dtype == torch.bfloat16


def test_an_llm_that_fails_is_not_packed_and_a_bug_of_ours_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone("llama")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("rope")

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "forward", fails)
        assert why_not_packed(model) == "'rope'"
    monkeypatch.setattr(capabilities, "probing", None)  # called in a frame of ours
    with pytest.raises(TypeError):
        why_not_packed(model)
