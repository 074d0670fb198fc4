"""Rendered conversations -> padded tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmllm.batch import IGNORE_INDEX, Batch
from mmllm.data.chat import Rendered


def collate(
    rendered: Sequence[Rendered],
    *,
    pad_token_id: int,
    example_ids: Sequence[str],
    **images: Tensor,
) -> Batch:
    """A training batch, padded on the right: causal attention never looks there, and no label stands there.

    `images` are a Batch's tensors of pictures: `pixel_values`, `image_sizes`, or `image_features`.
    """
    longest = max(len(one.input_ids) for one in rendered)
    input_ids = torch.full((len(rendered), longest), pad_token_id)
    labels = torch.full((len(rendered), longest), IGNORE_INDEX)
    mask = torch.zeros_like(input_ids)
    for row, one in enumerate(rendered):
        length = len(one.input_ids)
        input_ids[row, :length] = torch.tensor(one.input_ids)
        labels[row, :length] = torch.tensor(one.labels)
        mask[row, :length] = 1
    return Batch(input_ids, mask, labels, example_ids=list(example_ids), **images)
