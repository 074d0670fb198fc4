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
    """Cross entropy summed over tokens: [K, V], [K] -> []. In float32 whatever the logits are."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


CHUNK_LOGITS = 2**26  # of one chunk: 256 MB in float32, of which about three copies live at once
CPU_CHUNK_LOGITS = 2**23  # fewer, and adding up the head's gradient, once a chunk, costs more
MIN_CHUNK_TOKENS = 512  # with fewer a GPU waits for the head's weights, which every chunk reads


def head_loss_sum(head: nn.Module, hidden: Tensor, targets: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Cross entropy behind a head, summed: the decoder's output [K, D] and next tokens [K] -> [].

    The logits [K, V] are the largest tensor of a small LLM with a large vocabulary, so they are made `chunk_tokens`
    rows at a time, forgotten, and made again in backward. By default a chunk has CHUNK_LOGITS logits, and at least
    MIN_CHUNK_TOKENS rows. The head is called as it is: tied, with adapters, in autocast. On a CPU a head that is only
    its weight makes them once, see `linear_loss_sum`, in chunks of CPU_CHUNK_LOGITS.
    """
    if hidden.device.type == "cpu" and is_plain_linear(head):
        weight: Any = head.weight
        size = chunk_tokens or max(1, CPU_CHUNK_LOGITS // _vocab_size(head))
        return linear_loss_sum(hidden, weight, targets, chunk_tokens=size)
    size = chunk_tokens or max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // _vocab_size(head))
    if len(targets) <= size:
        return token_loss_sum(head(hidden), targets)

    def chunk_loss(rows: Tensor, wanted: Tensor) -> Tensor:
        return token_loss_sum(head(rows), wanted)

    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    losses = [checkpoint(chunk_loss, rows, wanted, use_reentrant=False) for rows, wanted in chunks]
    return torch.stack(losses).sum()


def _vocab_size(head: nn.Module) -> int:
    """Logits of a row, of a head with adapters or trained rows as well: their first linear layer is the head itself."""
    return next(int(layer.out_features) for layer in head.modules() if isinstance(layer, nn.Linear))


def supervised_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next token is supervised [B, T - 1], and those next tokens [K]."""
    targets = labels[:, 1:]
    mask = targets != IGNORE_INDEX
    return mask, targets[mask]


def supervised_counts(batch: Batch) -> list[int]:
    """How many next tokens each example is taught, in the order in which they stand in the rows."""
    mask = batch.labels[:, 1:] != IGNORE_INDEX
    if batch.position_ids is None:
        return [int(count) for count in mask.sum(1)]
    begins = (batch.position_ids == 0) & (batch.attention_mask != 0)
    counts: list[int] = []
    for starts, supervised in zip(begins, mask, strict=True):
        owner = starts.cumsum(0)[1:][supervised] - 1
        counts += torch.bincount(owner, minlength=int(starts.sum())).tolist()
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
    """The loss of a batch of conversations, summed over its supervised tokens []; or of each example [examples].

    `with_mask` says whether the LLM is told of the padding, see `needs_mask`.

    About nineteen in twenty rows of image data are not supervised, so the head runs on those that are, chunk by chunk
    (`head_loss_sum`). Without `plain_head` the LLM makes the logits of all rows at once. A mixture of
    experts whose config says `output_router_logits` gets its router's loss in training, once for each supervised
    token, so that it keeps its weight when the step divides by their number. That loss is one of the whole batch:
    with it, and only with it, a batch's loss is not the sum of its rows'.
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
            return torch.stack([head_loss_sum(head, some, wanted, chunk_tokens=chunk_tokens) for some, wanted in rows])
        return head_loss_sum(head, hidden[mask], targets, chunk_tokens=chunk_tokens)
    outputs = language_model(**inputs)
    logits = outputs.logits[:, :-1][mask]
    if per_example:
        counts = supervised_counts(batch)
        rows = zip(logits.split(counts), targets.split(counts), strict=True)
        return torch.stack([token_loss_sum(some, wanted) for some, wanted in rows])
    loss = token_loss_sum(logits, targets)
    if has_router_loss(language_model) and language_model.training:
        loss = loss + language_model.config.router_aux_loss_coef * outputs.aux_loss * len(targets)
    return loss
