"""Ranks: sums and gathers over processes, which work the same with one process, and how a process is set up."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmllm.config import RunConfig
from mmllm.errors import MmllmError

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

LONGEST_WAIT = timedelta(hours=2)  # for another process, which may validate or save a large model


def build_accelerator(config: RunConfig) -> Any:
    """accelerate's Accelerator for this launch. Raises MmllmError if it does not run all launched processes."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, patch_environment

    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else transformers leaves weights empty on other ranks
    # accelerate only starts the processes; the strategies of mmllm/distributed shard the model, on CPU too
    with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_DEEPSPEED="false"):
        accelerator = Accelerator(
            mixed_precision="bf16" if config.compute.precision == "bf16" else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
    num_launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != num_launched:
        raise MmllmError(f"{num_launched} processes were launched but accelerate runs {accelerator.num_processes}; "
                         "on CPU set ACCELERATE_USE_CPU=true")  # fmt: skip
    return accelerator


def all_reduce_sum(accelerator: Any, value: float) -> float:
    """The sum of a number over all ranks."""
    return all_reduce_sums(accelerator, [value])[0]


def all_reduce_sums(accelerator: Any, values: Sequence[float]) -> list[float]:
    """The sum of each number over all ranks, in one exchange."""
    if accelerator.num_processes == 1:
        return [float(value) for value in values]
    totals = torch.tensor([float(value) for value in values], dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(totals)
    sums: list[float] = totals.tolist()
    return sums


@torch.no_grad()
def broadcast_from_first(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Copies the first rank's values to every rank by way of `device`; each tensor stays on its own device."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for tensor in tensors:
        sent = tensor.detach().to(device)
        torch.distributed.broadcast(sent, 0)
        tensor.copy_(sent)


_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cores_of_process() -> int:
    """The number of CPU cores that each process on this machine may use, by CPU affinity and the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_QUOTA.is_file():
        quota, _, period = _CPU_QUOTA.read_text().partition(" ")
        if quota.isdigit():  # `max` means no quota
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def set_threads(config: RunConfig) -> None:
    """Sets `compute.num_threads`; without it, lowers torch's default to the number of cores that this process may use.

    torch counts the machine's cores, but a container may use only some of them: further threads wait for each other.
    """
    if config.compute.num_threads:
        torch.set_num_threads(config.compute.num_threads)
    elif torch.get_num_threads() > (cores := cores_of_process()):
        torch.set_num_threads(cores)


def gather_all(accelerator: Any, values: dict[_Key, _Value]) -> dict[_Key, _Value]:
    """The merged entries of all ranks. Every rank has to call it."""
    if accelerator.num_processes == 1:
        return values
    entries: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(entries, values)
    return {key: value for rank_entries in entries for key, value in rank_entries.items()}
