"""Ranks: the one place that knows there may be several processes. Everything runs the same with one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmllm.config import RunConfig
from mmllm.errors import MmllmError

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

LONGEST_WAIT = timedelta(hours=2)  # of a process for another one, which may validate or save a large model


def build_accelerator(config: RunConfig) -> Any:
    """accelerate's Accelerator for this launch. Raises MmllmError where fewer processes came up than were asked for."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, patch_environment

    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would leave weights empty on other ranks
    # mmllm/distributed/strategy.py shards the model itself, on CPU too; accelerate only brings the processes up
    with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="false"):
        accelerator = Accelerator(
            mixed_precision="bf16" if config.compute.precision == "bf16" else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise MmllmError(f"{asked} processes were launched but accelerate runs {accelerator.num_processes}; "
                         "on CPU set ACCELERATE_USE_CPU=true")  # fmt: skip
    return accelerator


def all_reduce_sum(accelerator: Any, value: float) -> float:
    """The sum of a number over all ranks."""
    return all_reduce_sums(accelerator, [value])[0]


def all_reduce_sums(accelerator: Any, values: Sequence[float]) -> list[float]:
    """The sum of each number over all ranks, in one exchange."""
    if accelerator.num_processes == 1:
        return [float(value) for value in values]
    totals = torch.tensor([float(one) for one in values], dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(totals)
    sums: list[float] = totals.tolist()
    return sums


_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cores_of_process() -> int:
    """The CPU cores that each of the processes here may keep busy, by their affinity and by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_QUOTA.is_file():
        quota, _, period = _CPU_QUOTA.read_text().partition(" ")
        if quota.isdigit():  # `max` is none
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def set_threads(config: RunConfig) -> None:
    """`compute.num_threads`; or torch's own number, but no more than the cores that this process may use.

    torch counts the machine's cores, of which a container may have a few: threads beyond them wait for each other.
    """
    if config.compute.num_threads:
        torch.set_num_threads(config.compute.num_threads)
    elif torch.get_num_threads() > (cores := cores_of_process()):
        torch.set_num_threads(cores)


def gather_all(accelerator: Any, values: dict[_Key, _Value]) -> dict[_Key, _Value]:
    """The entries of all ranks together. Every rank has to call it."""
    if accelerator.num_processes == 1:
        return values
    found: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(found, values)
    return {key: value for one in found for key, value in one.items()}
