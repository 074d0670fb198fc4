"""A cache of values by key that holds no more than a number of bytes: the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class ByteCache(Generic[Key, Value]):
    """Not safe from several threads: the scheduler's thread alone uses it."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.num_hits = self.num_misses = 0
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> Value | None:
        entry = self._values.get(key)
        if entry is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._values.move_to_end(key)
        return entry[0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Keeps a value, unless it alone is larger than the cache."""
        self.drop(key)
        if num_bytes > self.max_bytes:
            return
        self._values[key] = (value, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            _, (_, dropped) = self._values.popitem(last=False)
            self.num_bytes -= dropped

    def drop(self, key: Key) -> None:
        if (entry := self._values.pop(key, None)) is not None:
            self.num_bytes -= entry[1]

    def clear(self) -> None:
        self._values.clear()
        self.num_bytes = 0
