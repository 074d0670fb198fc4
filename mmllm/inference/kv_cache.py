"""The KV cache of the running rows: one rectangle of keys and values, which rows join and leave.

Rows are padded on the left, so the newest token of every row is in the last column. Shapes: `B` rows, `W` columns,
`H` heads, `d` width of a head, `T` tokens of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from mmllm.model.vlm import VisionLanguageModel

SPARE_COLUMNS = 32  # allocated beyond the last column, so that most steps write without copying the rectangle

Columns = tuple[Tensor, Tensor]  # keys and values of one layer


class RectangleLayer(DynamicLayer):  # type: ignore[misc]
    """One layer. `keys` and `values` [B, H, W, d] are the used columns of larger buffers."""

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Columns:
        """Appends columns. Returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_held = self.get_seq_length()
        width = num_held + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < width:
            held = (self.keys, self.values) if num_held else (key_states[..., :0, :], value_states[..., :0, :])
            self._buffers = [_with_spare(columns, width) for columns in held]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., num_held:width, :] = new
        self.keys, self.values = (buffer[..., :width, :] for buffer in self._buffers)
        return self.keys, self.values

    def replace(self, columns: Columns) -> None:
        """Holds these keys and values, and nothing else."""
        if not self.is_initialized:
            self.lazy_initialization(*columns)
        self._buffers = [_with_spare(one, one.shape[-2]) for one in columns]
        self.keys, self.values = (buffer[..., : columns[0].shape[-2], :] for buffer in self._buffers)


def _with_spare(columns: Tensor, width: int) -> Tensor:
    """A copy of columns [B, H, W, d] with room for `width` and some more."""
    batch, heads, held, size = columns.shape
    buffer = columns.new_zeros(batch, heads, width + SPARE_COLUMNS, size)
    buffer[..., :held, :] = columns
    return buffer


@dataclass(frozen=True, eq=False)
class StoredRow:
    """Keys and values [1, H, T, d] of one row in each layer, without padding."""

    layers: tuple[Columns, ...]

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


class KVCache(Cache):  # type: ignore[misc]
    """The rectangle of all layers, and how many tokens each row has. Sliding windows are masked, not cut off."""

    def __init__(self, lengths: Sequence[int]):
        super().__init__(layer_class_to_replicate=RectangleLayer)
        self.lengths = list(lengths)

    @property
    def width(self) -> int:
        return self.layers[0].get_seq_length() if self.layers else 0

    @property
    def bytes_per_token(self) -> int:
        """Of one token of one row, over all layers."""
        cells = max(1, len(self.lengths) * self.width)
        total: int = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
        return total // cells

    def row(self, index: int, length: int) -> StoredRow:
        """A copy of the first `length` tokens of a row."""
        start = self.width - self.lengths[index]
        return StoredRow(
            tuple(
                (
                    layer.keys[index : index + 1, :, start : start + length].clone(),
                    layer.values[index : index + 1, :, start : start + length].clone(),
                )
                for layer in self.layers
            )
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all other rows, and the columns that only they used."""
        self.lengths = [self.lengths[row] for row in rows]
        width = max(self.lengths)
        for layer in self.layers:
            index = torch.tensor(rows, device=layer.keys.device)
            layer.replace(
                tuple(columns[..., -width:, :].index_select(0, index) for columns in (layer.keys, layer.values))
            )

    def join(self, other: KVCache) -> None:
        """Adds the rows of another cache after its own."""
        width = max(self.width, other.width)
        self.lengths += other.lengths
        for layer, others in zip(self.layers, other.layers, strict=True):
            layer.replace(_stack([(layer.keys, layer.values), (others.keys, others.values)], width))

    @staticmethod
    def of_rows(rows: Sequence[StoredRow | None], lengths: Sequence[int]) -> KVCache:
        """A cache of the first `length` tokens of each stored row; None where the length is 0."""
        cache, width = KVCache(lengths), max(lengths)
        some = next(row for row in rows if row is not None)
        for number, (keys, values) in enumerate(some.layers):
            parts = [
                tuple(columns[..., :length, :] for columns in ((keys, values) if row is None else row.layers[number]))
                for row, length in zip(rows, lengths, strict=True)
            ]
            cache.layers.append(RectangleLayer())
            cache.layers[-1].replace(_stack(parts, width))
        return cache


def _stack(parts: Sequence[Any], width: int) -> Columns:
    """Rows of several rectangles in one of `width` columns, each padded on the left."""
    stacked = [torch.cat([_pad_left(columns, width) for columns in both]) for both in zip(*parts, strict=True)]
    return stacked[0], stacked[1]


def _pad_left(columns: Tensor, width: int) -> Tensor:
    batch, heads, held, size = columns.shape
    return torch.cat([columns.new_zeros(batch, heads, width - held, size), columns], -2)


def mask_of(lengths: Sequence[int], width: int) -> Tensor:
    """The attention mask [B, W] of rows of these lengths, padded on the left."""
    return (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


def pad_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, W] of these prompts, padded on the left, and their attention mask [B, W]."""
    mask = mask_of([len(prompt) for prompt in prompts], max(map(len, prompts)))
    ids = torch.full_like(mask, pad_token_id)
    ids[mask.bool()] = torch.tensor([token for prompt in prompts for token in prompt])
    return ids, mask


def next_logits(model: VisionLanguageModel, cache: KVCache, lengths: Sequence[int], **inputs: Tensor) -> Tensor:
    """Runs new columns, `input_ids` [B, S] or `inputs_embeds` [B, S, D], and appends them to the cache.

    `lengths` are those of the rows with their new tokens. Returns the logits [B, V] after each row.
    """
    num_new = next(iter(inputs.values())).shape[1]
    mask = mask_of(lengths, cache.width + num_new).to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -num_new:]
    options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
    if "output_router_logits" in model.language_inputs:
        options["output_router_logits"] = False  # for a training loss only; fails on one new token after padding
    out = model(attention_mask=mask, position_ids=positions, past_key_values=cache, **options, **inputs)
    cache.lengths = list(lengths)
    logits: Tensor = out.logits[:, -1]
    return logits
