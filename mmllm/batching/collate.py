"""Rendered conversations -> padded tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mmllm.batch import IGNORE_INDEX, Batch
from mmllm.batching.packing import packed_position_ids
from mmllm.chat.renderer import RenderedConversation


def collate(
    rendered: Sequence[RenderedConversation],
    *,
    pad_token_id: int,
    example_ids: Sequence[str],
    per_row: Sequence[int] | None = None,
    **images: Tensor,
) -> Batch:
    """A training batch, padded on the right: causal attention never sees the padding, and it has no labels.

    `per_row` is the number of examples in each row, in their order; by default each example has a row of its own.
    `images` are the picture tensors of a Batch, in the order of the examples: `pixel_values`, `image_sizes` or
    `image_features`.
    """
    remaining = iter(rendered)
    rows = [list(itertools.islice(remaining, count)) for count in per_row or [1] * len(rendered)]
    lengths = [[len(example.input_ids) for example in row] for row in rows]
    width = max(sum(row) for row in lengths)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    mask = torch.zeros_like(input_ids)
    for row, examples in enumerate(rows):
        start = 0
        for example in examples:
            span = slice(start, start + len(example.input_ids))
            input_ids[row, span] = torch.tensor(example.input_ids)
            labels[row, span] = torch.tensor(example.labels)
            labels[row, start] = IGNORE_INDEX  # the example before must not predict this one's first token
            start = span.stop
        mask[row, :start] = 1
    position_ids = packed_position_ids(lengths, width) if per_row else None
    return Batch(input_ids, mask, labels, position_ids=position_ids, example_ids=list(example_ids), **images)
