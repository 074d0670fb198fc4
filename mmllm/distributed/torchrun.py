"""`mmllm train --processes N`: starts torch's launcher, whose processes share each batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmllm.config import ConfigError, RunConfig


def launch(path: Path, overrides: Sequence[str], config: RunConfig, num_processes: int) -> None:
    """Becomes the launcher of `num_processes` processes of this run, each with its part of `compute.batch_size`.

    Raises ConfigError where the batch cannot be divided evenly, or there are fewer GPUs than processes.
    """
    batch_size, rest = divmod(config.compute.batch_size, num_processes)
    if rest:
        raise ConfigError(
            f"compute.batch_size: {config.compute.batch_size} examples are not the same number for each of "
            f"{num_processes} processes; give a multiple of {num_processes}"
        )
    import torch

    from mmllm.distributed.ranks import cores_of_process

    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores_of_process() // num_processes)))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device.type == "mps":  # processes cannot share a Mac's GPU
        environment["ACCELERATE_USE_CPU"] = "true"
    elif num_processes > (count := torch.accelerator.device_count()):
        raise ConfigError(f"--processes {num_processes}: each process needs a GPU of its own, and there are {count}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command = [*launcher, "-m", "mmllm.cli", "train", str(path), *overrides, f"compute.batch_size={batch_size}"]
    sys.stdout.flush()
    if os.name == "posix":
        os.execve(sys.executable, [sys.executable, *command], environment)
    sys.exit(subprocess.call([sys.executable, *command], env=environment))
