"""The chunked loss: what the whole one says, without its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmllm.config import LoraConfig
from mmllm.inference.engine import Engine
from mmllm.kernels.fused_cross_entropy import is_plain_linear
from mmllm.model.build import build_model
from mmllm.model.capabilities import has_plain_head, needs_mask
from mmllm.training.lora import add_lora
from mmllm.training.losses import conversation_loss_sum, head_loss_sum, token_loss_sum
from tests.builders.backward import gradients, saved_bytes
from tests.builders.conversations import ANSWERED, batch_of
from tests.builders.tiny_backbones import BACKBONES, STATE_SPACE, make_backbone_parts

WHOLE = 10**9
K, D, V = 60, 8, 50


class _Largest(TorchDispatchMode):
    """How large the largest tensor was that any operation made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [tensor.numel() for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        self.numel = max([self.numel, *made])
        return out


def assert_equal(one: Tensor, other: Tensor) -> None:
    assert float((one - other).norm() / other.norm()) <= 1e-6


def rows(*, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    """With a bias, logits are made again in backward; without, and on a CPU, gradients are found with the logits."""
    torch.manual_seed(0)
    return nn.Linear(D, V, bias=bias), torch.randn(K, D, requires_grad=True), torch.randint(0, V, (K,))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 20, K - 1, WHOLE])
@pytest.mark.parametrize("is_trained", [True, False], ids=["head trained", "head frozen"])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(chunk_tokens: int, is_trained: bool, bias: bool) -> None:
    found = []
    for is_whole in (True, False):
        head, hidden, targets = rows(bias=bias)
        head.requires_grad_(is_trained)
        if is_whole:
            loss = token_loss_sum(head(hidden), targets)
        else:
            loss = head_loss_sum(head, hidden, targets, chunk_tokens=chunk_tokens)
        (loss / 3).backward()
        found.append((loss.detach(), hidden.grad, head.weight.grad))
    (loss_whole, hidden_whole, head_whole), (loss_chunks, hidden_chunks, head_chunks) = found
    assert_equal(loss_chunks, loss_whole)
    assert_equal(hidden_chunks, hidden_whole)
    if is_trained:
        assert_equal(head_chunks, head_whole)
    else:
        assert head_chunks is None


def test_all_logits_never_live_at_once_neither_forward_nor_backward() -> None:
    largest = {}
    for size in (WHOLE, 10):
        head, hidden, targets = rows(bias=True)
        with _Largest() as seen:
            head_loss_sum(head, hidden, targets, chunk_tokens=size).backward()
        largest[size] = seen.numel
    assert largest == {WHOLE: K * V, 10: max(10 * V, K * D)}
    kept = {
        size: saved_bytes(lambda size=size: head_loss_sum(*rows(bias=True), chunk_tokens=size)) for size in (WHOLE, 10)
    }
    assert kept[WHOLE] >= 4 * K * V
    assert kept[10] < kept[WHOLE] - 3 * K * V


def test_a_plain_head_on_a_cpu_keeps_its_gradients_and_no_logits() -> None:
    head, hidden, targets = rows()
    with _Largest() as seen:
        head_loss_sum(head, hidden, targets, chunk_tokens=5).backward()
    assert seen.numel == max(K * D, V * D, 5 * V) < K * V
    assert saved_bytes(lambda: head_loss_sum(*rows(), chunk_tokens=5)) <= 4 * (K * D + V * D)


@pytest.mark.parametrize("changed", ["bias", "hook", "adapter"])
def test_a_head_that_is_more_than_its_weight_is_called_as_it_is(changed: str) -> None:
    head, hidden, targets = rows(bias=changed == "bias")
    assert not is_plain_linear(head) if changed == "bias" else is_plain_linear(head)
    if changed == "hook":
        head.register_forward_hook(lambda module, given, out: 2 * out)
    elif changed == "adapter":
        config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        head = peft.get_peft_model(nn.Sequential(head), config).base_model.model[0]
    assert_equal(head_loss_sum(head, hidden, targets, chunk_tokens=7), token_loss_sum(head(hidden), targets))


def test_a_plain_head_takes_part_in_autocast() -> None:
    found = []
    for is_whole in (True, False):
        head, hidden, targets = rows()
        with torch.autocast("cpu", torch.bfloat16):
            loss = token_loss_sum(head(hidden), targets) if is_whole else head_loss_sum(head, hidden, targets)
        loss.backward()
        found.append((loss.detach(), hidden.grad, head.weight.grad))
        assert loss.dtype == head.weight.grad.dtype == torch.float32
    for whole, chunks in zip(*found, strict=True):
        assert float((whole - chunks).norm() / whole.norm()) <= 1e-2


def test_a_head_without_a_row_has_a_gradient_of_zero() -> None:
    head, hidden, targets = rows()
    head_loss_sum(head, hidden[:0], targets[:0]).backward()
    assert torch.equal(head.weight.grad, torch.zeros(V, D))


def test_a_head_without_a_gradient_to_make_keeps_nothing() -> None:
    head, hidden, targets = rows()
    with torch.no_grad():
        loss = head_loss_sum(head, hidden, targets, chunk_tokens=10)
    assert_equal(loss, head_loss_sum(head, hidden, targets, chunk_tokens=WHOLE).detach())
    assert not loss.requires_grad


@pytest.mark.parametrize("attention", ["eager", None], ids=["eager", "its own"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_padding_on_the_right_teaches_the_same_with_and_without_a_mask(
    kind: str, attention: str | None, tiny_parts: Path, tmp_path: Path
) -> None:
    config = make_backbone_parts(tmp_path, kind, tiny_parts)
    assert config.language
    if kind not in STATE_SPACE:
        language = config.language.model_copy(update={"attention": attention})
        config = config.model_copy(update={"language": language})
    torch.manual_seed(0)
    model, processor, _ = build_model(config)
    assert not needs_mask(model.language_model)
    batch = batch_of(Engine(model, processor, name="tiny"), *ANSWERED)
    assert not batch.attention_mask.all(), "rows of different lengths"
    found = []
    for with_mask in (True, False):
        model.zero_grad()
        loss = conversation_loss_sum(model, batch, plain_head=False, with_mask=with_mask)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    for one, other in zip(*found, strict=True):
        assert_equal(one, other)


@torch.no_grad()
def test_an_llm_that_looks_ahead_or_counts_padding_is_given_the_mask(tiny_parts: Path, tmp_path: Path) -> None:
    def built(kind: str, **changes: Any) -> Any:
        return build_model(make_backbone_parts(tmp_path / kind, kind, tiny_parts, **changes))[0].language_model

    language_model = built("llama")

    def look_at_all(module: Any, given: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    with language_model.get_decoder().register_forward_hook(look_at_all):
        assert needs_mask(language_model)
    assert not needs_mask(language_model)
    assert needs_mask(built("mixtral", output_router_logits=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_judges_targets_that_it_holds_for_impossible(dtype: torch.dtype) -> None:
    head = nn.Linear(D, V, bias=False)
    hidden, targets = torch.randn(K, D), torch.randint(0, V, (K,))
    with torch.no_grad():
        head.weight.mul_(1000)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            logits = head(hidden)
            loss = head_loss_sum(head, hidden, targets)
    assert float(logits.softmax(1, torch.float32).gather(1, targets[:, None]).min()) == 0
    assert_equal(loss, token_loss_sum(logits, targets))


@pytest.mark.parametrize("adapters", [None, "all-linear", "lm_head"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_every_llm_learns_the_same_in_chunks(kind: str, adapters: str | None, tiny_parts: Path, tmp_path: Path) -> None:
    config = make_backbone_parts(tmp_path, kind, tiny_parts)
    torch.manual_seed(0)
    model, processor, _ = build_model(config)
    head = model.get_output_embeddings()
    is_plain = has_plain_head(model.language_model)
    if adapters == "lm_head" and head.weight is model.get_input_embeddings().weight:
        pytest.skip("peft does not adapt a head that is tied")
    if adapters:
        model.requires_grad_(False)
        model.projector.requires_grad_(True)
        targets = ("lm_head", "embed_out") if adapters == "lm_head" else adapters
        add_lora(model, LoraConfig(rank=2, target_modules=targets))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(parameter, std=0.1)
    model.train()
    batch = batch_of(Engine(model, processor, name="tiny"), *ANSWERED)
    found = []
    for is_whole in (True, False):
        model.zero_grad()
        loss = conversation_loss_sum(model, batch, plain_head=is_plain and not is_whole, chunk_tokens=3)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert_equal(found[1][0], found[0][0])
    assert_equal(found[1][1], found[0][1])
