"""Checksums of the files that hold the ranks' shards of a state. Each rank computes, and later checks, some of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmllm.batching.sampler import rank_slice
from mmllm.disk import file_hash
from mmllm.distributed.ranks import gather_all


def _names_of_rank(names: list[str], accelerator: Any) -> list[str]:
    return rank_slice(sorted(names), accelerator.process_index, accelerator.num_processes)


def shard_checksums(folder: Path, accelerator: Any) -> dict[str, str]:
    """The checksum of every file below a folder, by its path relative to it. Every rank has to call it."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return gather_all(accelerator, {name: file_hash(folder / name) for name in _names_of_rank(names, accelerator)})


def damaged_shards(folder: Path, checksums: Mapping[str, str], accelerator: Any) -> list[str]:
    """The missing files and those with another checksum, found by any rank. Every rank has to call it."""
    paths = {name: folder / name for name in _names_of_rank(list(checksums), accelerator)}
    damaged = {name: True for name, path in paths.items() if not path.is_file() or file_hash(path) != checksums[name]}
    return sorted(gather_all(accelerator, damaged))
