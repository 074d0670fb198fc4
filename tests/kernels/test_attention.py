"""Attention in blocks is attention: of every mask, with its gradients, in every LLM, and only where it is faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.batching.packing import packed_position_ids
from mmllm.inference.engine import Engine
from mmllm.kernels import attention
from mmllm.kernels.attention import (
    BLOCKED,
    QUERIES,
    SelfAttention,
    blocked_attention,
    is_blocked_faster,
    use_blocked_attention,
    use_self_attention,
)
from mmllm.model.build import build_model
from mmllm.model.capabilities import has_plain_head, why_not_packed
from mmllm.training.losses import conversation_loss_sum
from tests.builders.backward import gradients
from tests.builders.conversations import ANSWERED, TWO, batch_of, generate
from tests.builders.tiny_backbones import BACKBONES, HAS_NOT, SEES_ITS_NEIGHBOURS, backbone, make_backbone_parts

# Falcon's sdpa is code of its own, which blocks cannot take the place of.
WITH_SDPA = [kind for kind in BACKBONES if (kind, "sdpa") not in HAS_NOT and kind != "falcon"]
B, H, D = 2, 3, 8


def qkv(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, length, D, dtype=dtype, requires_grad=True) for _ in range(3)]


def masks(length: int) -> dict[str, Tensor]:
    """[B, 1, T, T]: examples of a packed row, a sliding window, and padding that sees nothing and that nobody sees."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    third = length // 3
    numbers = torch.stack([torch.arange(length) // max(1, third), torch.arange(length) // max(1, length // 2)])
    packed = (numbers[:, :, None] == numbers[:, None]) & causal
    window = causal & ~causal.tril(-5)
    padded = causal.expand(B, -1, -1).clone()
    padded[0, :, length - third :] = False
    padded[0, length - third :] = False
    return {"packed": packed[:, None], "window": window.expand(B, 1, -1, -1), "padded": padded[:, None]}


@pytest.mark.parametrize("length", [1, 7, QUERIES, QUERIES + 1, 3 * QUERIES + 40])
@pytest.mark.parametrize("kind", ["causal", "full", "packed", "window", "padded"])
def test_blocks_give_what_attention_and_its_gradients_are(kind: str, length: int) -> None:
    mask = masks(length).get(kind)
    found = []
    for is_ours in (False, True):
        query, key, value = qkv(length)
        if is_ours:
            out = blocked_attention(query, key, value, mask, is_causal=kind == "causal")
        else:
            out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=kind == "causal")
        seen = torch.ones(B, 1, length, 1) if mask is None else mask.any(-1, keepdim=True)
        out = torch.where(seen.bool(), out, torch.zeros(()))  # what padding says is nobody's
        (out * torch.arange(D)).sum().backward()
        found.append([out.detach(), query.grad, key.grad, value.grad])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_scores_are_made_for_a_block_at_a_time_and_not_kept() -> None:
    query, key, value = qkv(4 * QUERIES)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        blocked_attention(query, key, value, is_causal=True)
    assert max(kept) == query.numel()


def test_gradients_are_the_same_where_autocast_is_on_in_backward_too() -> None:
    found = []
    for is_inside in (False, True):
        query, key, value = qkv(QUERIES, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (blocked_attention(4 * query, key, value, is_causal=True).float() * torch.arange(D)).sum()
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        found.append([one.grad for one in (query, key, value)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_block_that_no_mask_leaves_open_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    made = attention._chances

    def counted(query: Tensor, key: Tensor, *given: Any) -> Tensor:
        sizes.append(len(query) * query.shape[1] * key.shape[1])
        return made(query, key, *given)

    monkeypatch.setattr(attention, "_chances", counted)
    length = 4 * QUERIES
    numbers = torch.arange(length) // QUERIES
    mask = (numbers[:, None] == numbers[None]).tril().expand(B, 1, -1, -1)
    blocked_attention(*qkv(length), mask)
    assert sum(sizes) == B * H * length * QUERIES


def force(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks also in fp32 and without gradients; collects the lengths they were used for."""
    lengths: list[int] = []

    def always(query: Tensor, key: Tensor, value: Tensor) -> bool:
        lengths.append(query.shape[2])
        return query.shape[2] == key.shape[2]

    monkeypatch.setattr(attention, "is_blocked_faster", always)
    return lengths


@torch.no_grad()
@pytest.mark.parametrize("kind", WITH_SDPA)
def test_every_llm_says_the_same_in_blocks_and_keeps_packed_examples_apart(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backbone(kind, "sdpa")
    lengths = (11, 4, 13)
    embeds = torch.randn(2, sum(lengths), 32, generator=torch.Generator().manual_seed(1))
    padding = torch.ones(2, sum(lengths), dtype=torch.long)
    padding[0, 20:] = 0
    inputs = [
        {},
        {"attention_mask": padding},
        {"position_ids": packed_position_ids([lengths, lengths[::-1]], sum(lengths))},
    ]

    def logits(**given: Any) -> Tensor:
        found: Tensor = model(inputs_embeds=embeds, use_cache=False, **given).logits
        return found

    theirs = [logits(**given) for given in inputs]
    use_blocked_attention(model)
    used = force(monkeypatch)
    for given, expected in zip(inputs, theirs, strict=True):
        seen = given.get("attention_mask", torch.ones(2, sum(lengths))).bool()
        torch.testing.assert_close(logits(**given)[seen], expected[seen], rtol=1e-4, atol=1e-5)
    assert used
    assert (why_not_packed(model) is None) == (kind not in SEES_ITS_NEIGHBOURS)


@pytest.mark.parametrize("kind", WITH_SDPA)
def test_every_llm_learns_in_blocks_as_exactly_as_without(kind: str, tiny_parts: Path, tmp_path: Path) -> None:
    config = make_backbone_parts(tmp_path, kind, tiny_parts)
    torch.manual_seed(0)
    model, processor, _ = build_model(config)
    batch = batch_of(Engine(model, processor, name="tiny"), *ANSWERED)
    model.train()
    found = {}
    for way in ("fp32", "sdpa", "blocks"):
        if way == "blocks":
            use_blocked_attention(model.language_model)
            assert model.language_model.config._attn_implementation == BLOCKED
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "fp32"):
            loss = conversation_loss_sum(model, batch, plain_head=has_plain_head(model.language_model))
        loss.backward()
        found[way] = gradients(model)
    theirs, ours = (float((found[way] - found["fp32"]).norm() / found["fp32"].norm()) for way in ("sdpa", "blocks"))
    assert 0 < ours <= 1.3 * theirs, "bf16 rounds, in both"


def test_answers_are_those_of_sdpa_and_no_file_names_the_blocks(tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = Engine.load(tiny_checkpoint, device="cpu")
    expected = generate(engine, TWO)
    use_blocked_attention(engine.model.language_model)
    assert torch.equal(generate(engine, TWO), expected)
    engine.model.save_pretrained(tmp_path)
    assert BLOCKED not in (tmp_path / "config.json").read_text()


def test_an_llm_that_was_given_another_attention_keeps_it() -> None:
    model = backbone("llama", "eager")
    use_blocked_attention(model)
    assert model.config._attn_implementation == "eager"


def test_blocks_are_for_training_in_bf16_alone() -> None:
    for dtype, is_faster in ((torch.float32, False), (torch.bfloat16, True)):
        parts = qkv(4, dtype)
        assert is_blocked_faster(*parts) == is_faster
        assert not is_blocked_faster(parts[0][:, :, :1], *parts[1:]), "a new token beside those of the cache"
        with torch.autocast("cpu", torch.bfloat16):
            assert is_blocked_faster(*parts)
        with torch.no_grad():
            assert not is_blocked_faster(*parts)
        assert not is_blocked_faster(*(part.detach() for part in parts))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_self_attention_is_torchs_own(precision: str) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    ours = nn.Sequential(nn.MultiheadAttention(16, 4, batch_first=True))
    ours[0].load_state_dict(theirs.state_dict())
    use_self_attention(ours)
    assert type(ours[0]) is SelfAttention
    assert ours[0].state_dict().keys() == theirs.state_dict().keys()
    found = []
    for module in (theirs, ours[0]):
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = module(x, x, x, need_weights=False)[0]
        out.square().sum().backward()
        found.append((out, x.grad, module.in_proj_weight.grad, module.out_proj.bias.grad))
    limit = 1e-5 if precision == "fp32" else 2e-2
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / one.norm()) <= limit


def test_attention_that_is_not_plain_is_left_to_torch() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    ours = nn.ModuleDict({"own": nn.MultiheadAttention(16, 4, batch_first=True)})
    ours["own"].load_state_dict(theirs.state_dict())
    use_self_attention(ours)
    x, other = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for given, options in (((x, x, x), {}), ((x, other, other), {"need_weights": False}),
                           ((x, x, x), {"need_weights": False, "attn_mask": hidden})):  # fmt: skip
        for one, two in zip(theirs(*given, **options), ours["own"](*given, **options), strict=True):
            assert (one is None and two is None) or torch.equal(one, two)
    crossed = nn.Sequential(nn.MultiheadAttention(16, 4, kdim=8, batch_first=True), nn.MultiheadAttention(16, 4))
    use_self_attention(crossed)
    assert [type(module) for module in crossed] == [nn.MultiheadAttention] * 2
