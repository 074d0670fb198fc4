"""Checksums of the files that ranks save their shares of a state in. Each rank sums, and later checks, some of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmllm.batching.sampler import rank_slice
from mmllm.checkpoint.adapter import file_hash
from mmllm.distributed.ranks import gather_all


def _share(names: list[str], accelerator: Any) -> list[str]:
    return rank_slice(sorted(names), accelerator.process_index, accelerator.num_processes)


def shard_sums(folder: Path, accelerator: Any) -> dict[str, str]:
    """The sum of every file below a folder, by its name there. Every rank has to call it."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return gather_all(accelerator, {name: file_hash(folder / name) for name in _share(names, accelerator)})


def damaged_shards(folder: Path, sums: Mapping[str, str], accelerator: Any) -> list[str]:
    """The files that are not what was written, or not there. Every rank has to call it, and gets those of all."""
    mine = {name: folder / name for name in _share(list(sums), accelerator)}
    wrong = {name: True for name, path in mine.items() if not path.is_file() or file_hash(path) != sums[name]}
    return sorted(gather_all(accelerator, wrong))
