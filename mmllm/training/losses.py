"""The loss of next-token prediction: a sum over supervised tokens. Labels are shifted here and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmllm.batch import IGNORE_INDEX, Batch
from mmllm.kernels.fused_cross_entropy import is_plain_linear, linear_loss_sum
from mmllm.model.capabilities import has_router_loss
from mmllm.model.vlm import VisionLanguageModel


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over tokens: [K, V], [K] -> []. Computed in float32 for logits of any dtype."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


CHUNK_LOGITS = 2**26  # per chunk: 256 MB in float32; about three copies are alive at once
CPU_CHUNK_LOGITS = 2**23  # with fewer, summing the head's gradient once a chunk costs more
MIN_CHUNK_TOKENS = 512  # with fewer, reading the head's weights in every chunk limits a GPU


def head_loss_sum(head: nn.Module, hidden: Tensor, targets: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Cross entropy of the head's logits, summed: the decoder's output [K, D] and next tokens [K] -> [].

    The logits [K, V] are the largest tensor of a small LLM with a large vocabulary. They are computed `chunk_tokens`
    rows at a time, discarded, and recomputed in backward. By default a chunk has CHUNK_LOGITS logits, and at least
    MIN_CHUNK_TOKENS rows. The head is called as a module, so it may be tied, have adapters, or run in autocast. On a
    CPU, a plain linear head computes its logits once in chunks of CPU_CHUNK_LOGITS, see `linear_loss_sum`.
    """
    if hidden.device.type == "cpu" and is_plain_linear(head):
        weight: Any = head.weight
        size = chunk_tokens or max(1, CPU_CHUNK_LOGITS // _vocab_size(head))
        return linear_loss_sum(hidden, weight, targets, chunk_tokens=size)
    size = chunk_tokens or max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // _vocab_size(head))
    if len(targets) <= size:
        return token_loss_sum(head(hidden), targets)

    def chunk_loss(rows: Tensor, row_targets: Tensor) -> Tensor:
        return token_loss_sum(head(rows), row_targets)

    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    losses = [checkpoint(chunk_loss, rows, row_targets, use_reentrant=False) for rows, row_targets in chunks]
    return torch.stack(losses).sum()


def _vocab_size(head: nn.Module) -> int:
    """The number of logits per row. In a head with adapters or trained rows, the first linear layer is the head."""
    return next(int(layer.out_features) for layer in head.modules() if isinstance(layer, nn.Linear))


def supervised_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [B, T] -> the mask of positions whose next token is supervised [B, T - 1], and those next tokens [K]."""
    targets = labels[:, 1:]
    mask = targets != IGNORE_INDEX
    return mask, targets[mask]


def supervised_counts(batch: Batch) -> list[int]:
    """The number of supervised next tokens of each example, in the order of the examples in the rows."""
    mask = batch.labels[:, 1:] != IGNORE_INDEX
    if batch.position_ids is None:
        return [int(count) for count in mask.sum(1)]
    is_start = (batch.position_ids == 0) & (batch.attention_mask != 0)
    counts: list[int] = []
    for starts, supervised in zip(is_start, mask, strict=True):
        example_index = starts.cumsum(0)[1:][supervised] - 1
        counts += torch.bincount(example_index, minlength=int(starts.sum())).tolist()
    return counts


def conversation_loss_sum(
    model: VisionLanguageModel,
    batch: Batch,
    *,
    plain_head: bool,
    with_mask: bool = True,
    chunk_tokens: int | None = None,
    always_runs_tower: bool = False,
    per_example: bool = False,
) -> Tensor:
    """The loss of a batch of conversations, summed over its supervised tokens []; or that of each example [examples].

    `with_mask` says whether the LLM gets the attention mask of a padded batch, see `needs_mask`.

    About nineteen in twenty rows of image data are not supervised, so the head runs only on those that are, chunk by
    chunk (`head_loss_sum`). Without `plain_head` the LLM computes the logits of all rows at once. A mixture of experts
    with `output_router_logits` in its config adds its router's loss in training, times the number of supervised
    tokens, because the step divides by that number. The router's loss is computed over the whole batch: only with it
    does a batch's loss differ from the sum of its rows' losses.
    """
    embeds = model.embed_batch(batch, always_runs_tower=always_runs_tower)
    language_model = model.language_model
    inputs = {"inputs_embeds": embeds, "use_cache": False}  # with a cache, packed examples would see each other
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    elif with_mask:
        inputs["attention_mask"] = batch.attention_mask
    mask, targets = supervised_rows(batch.labels)
    if plain_head:
        hidden = language_model.get_decoder()(**inputs).last_hidden_state[:, :-1]
        head = language_model.get_output_embeddings()
        if per_example:
            counts = supervised_counts(batch)
            rows = zip(hidden[mask].split(counts), targets.split(counts), strict=True)
            return torch.stack(
                [
                    head_loss_sum(head, row_hidden, row_targets, chunk_tokens=chunk_tokens)
                    for row_hidden, row_targets in rows
                ]
            )
        return head_loss_sum(head, hidden[mask], targets, chunk_tokens=chunk_tokens)
    outputs = language_model(**inputs)
    logits = outputs.logits[:, :-1][mask]
    if per_example:
        counts = supervised_counts(batch)
        rows = zip(logits.split(counts), targets.split(counts), strict=True)
        return torch.stack([token_loss_sum(row_logits, row_targets) for row_logits, row_targets in rows])
    loss = token_loss_sum(logits, targets)
    if has_router_loss(language_model) and language_model.training:
        loss = loss + language_model.config.router_aux_loss_coef * outputs.aux_loss * len(targets)
    return loss
