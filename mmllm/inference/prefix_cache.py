"""Keys and values of prompts that were answered, for later prompts that begin with the same tokens and pictures.

A second question about a picture, and the next turn of a conversation, prefill only what is new in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmllm.inference.byte_cache import ByteCache
from mmllm.inference.kv_cache import StoredRow
from mmllm.inference.picture_features import Picture

MAX_ROWS_A_GROUP = 32  # that have the same first picture, or none
MIN_SHARE = 0.5  # of a prompt: where less of it is known, prefilling it with the others is cheaper


@dataclass(frozen=True, eq=False)
class Prefix:
    """Token ids [T], where each picture's first slot is among them, and which picture it is."""

    ids: NDArray[np.int64]
    picture_starts: tuple[int, ...]
    picture_keys: tuple[bytes, ...]

    @staticmethod
    def of(ids: Sequence[int], pictures: Sequence[Picture], image_token_id: int) -> Prefix:
        array = np.array(ids, dtype=np.int64)
        slots = np.flatnonzero(array == image_token_id)
        firsts = np.cumsum([0, *(picture.num_tokens for picture in pictures)])[:-1]
        return Prefix(array, tuple(slots[firsts].tolist()), tuple(picture.key for picture in pictures))

    @property
    def group(self) -> bytes:
        """Its first picture; empty without one. Prompts of other groups share less than is worth using."""
        return self.picture_keys[0] if self.picture_keys else b""

    def num_shared(self, other: Prefix) -> int:
        """The number of first tokens that are the same in both, image tokens of the same pictures included."""
        length = min(len(self.ids), len(other.ids))
        different = np.flatnonzero(self.ids[:length] != other.ids[:length])
        shared = int(different[0]) if len(different) else length
        # up to there the slots are the same, so picture i of one begins where picture i of the other does
        for start, key, other_key in zip(self.picture_starts, self.picture_keys, other.picture_keys, strict=False):
            if start >= shared:
                break
            if key != other_key:
                return start
        return shared


class PrefixCache:
    """Stored rows by the tokens and pictures that they were computed from. The scheduler's thread alone uses it.

    A prompt is compared with the rows of its own first picture, or with those without a picture, and with no others: a
    job of a million pictures looks at as few as a chat.
    """

    def __init__(self, *, max_bytes: int):
        self._groups: ByteCache[bytes, tuple[tuple[Prefix, StoredRow], ...]] = ByteCache(max_bytes)  # newest row first

    @property
    def is_on(self) -> bool:
        return self._groups.max_bytes > 0

    def clear(self) -> None:
        self._groups.clear()

    def find(self, prompt: Prefix) -> tuple[StoredRow | None, int]:
        """(row, number of its first tokens that can be used); (None, 0) where too little of the prompt is known.

        At least the prompt's last token is left to compute: its logits are needed.
        """
        best: tuple[StoredRow | None, int] = (None, 0)
        for prefix, row in self._groups.get(prompt.group) or ():
            if (shared := min(prompt.num_shared(prefix), len(prompt.ids) - 1)) > best[1]:
                best = row, shared
        return best if best[1] >= MIN_SHARE * len(prompt.ids) else (None, 0)

    def put(self, prefix: Prefix, row: StoredRow) -> None:
        """Keeps a row, in place of rows of which it is the continuation."""
        others = self._groups.get(prefix.group) or ()
        rows = [(prefix, row), *(one for one in others if one[0].num_shared(prefix) < len(one[0].ids))]
        del rows[MAX_ROWS_A_GROUP:]
        while rows and sum(one.num_bytes for _, one in rows) > self._groups.max_bytes:
            rows.pop()
        self._groups.put(prefix.group, tuple(rows), sum(one.num_bytes for _, one in rows))
