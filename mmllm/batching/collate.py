"""Rendered conversations -> padded tensors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mmllm.batch import IGNORE_INDEX, Batch
from mmllm.batching.packing import positions
from mmllm.chat.renderer import Rendered


def collate(
    rendered: Sequence[Rendered],
    *,
    pad_token_id: int,
    example_ids: Sequence[str],
    per_row: Sequence[int] | None = None,
    **images: Tensor,
) -> Batch:
    """A training batch, padded on the right: causal attention never looks there, and no label stands there.

    `per_row` says how many examples stand in each row, in their order; without it, one. `images` are a Batch's tensors
    of pictures: `pixel_values`, `image_sizes`, or `image_features`, in the order of the examples.
    """
    left = iter(rendered)
    rows = [list(itertools.islice(left, count)) for count in per_row or [1] * len(rendered)]
    lengths = [[len(one.input_ids) for one in row] for row in rows]
    width = max(sum(row) for row in lengths)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    mask = torch.zeros_like(input_ids)
    for row, examples in enumerate(rows):
        start = 0
        for one in examples:
            span = slice(start, start + len(one.input_ids))
            input_ids[row, span] = torch.tensor(one.input_ids)
            labels[row, span] = torch.tensor(one.labels)
            labels[row, start] = IGNORE_INDEX  # an example's first token does not follow from the one before it
            start = span.stop
        mask[row, :start] = 1
    position_ids = positions(lengths, width) if per_row else None
    return Batch(input_ids, mask, labels, position_ids=position_ids, example_ids=list(example_ids), **images)
