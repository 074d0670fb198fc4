"""Runs of several processes, as a launcher starts them: under torchrun, or quicker, forked with the imports done."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIXED = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
STREAMS = {"out": 1, "err": 2}


def forkserver() -> Any:
    """What starts processes from a server that has imported what is slow to import: one for all tests of a process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mmllm.stages.registry", "accelerate", "peft", "deepspeed"])
    return context


def under_torchrun(
    driver: Path, arguments: Sequence[object], num_processes: int, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The real launcher. Each process imports torch and the rest anew, which is most of its time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return subprocess.run(
        [*command, driver, *map(str, arguments)], env={**os.environ, **FIXED, **(environment or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def forked(
    driver: Path, arguments: Sequence[object], num_processes: int, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The same processes with the same variables, from a server that has imported what is slow to import."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **FIXED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes), **(environment or {}),
    }  # fmt: skip
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    return _started(driver, arguments, ranks)


def forked_alone(driver: Path, arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """A process that no launcher started, as `forked`."""
    return _started(driver, arguments, [FIXED])


def _started(
    driver: Path, arguments: Sequence[object], environments: Sequence[dict[str, str]]
) -> subprocess.CompletedProcess[str]:
    context, processes = forkserver(), []
    with tempfile.TemporaryDirectory() as said:
        for number, environment in enumerate(environments):
            process = context.Process(target=_run, args=(driver, arguments, environment, f"{said}/{number}"))
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
        stdout, stderr = (
            "".join(file.read_text() for file in sorted(Path(said).glob(f"*.{name}"))) for name in STREAMS
        )
    returncode = next((code for process in processes if (code := process.exitcode)), 0)
    return subprocess.CompletedProcess([str(driver), *map(str, arguments)], returncode, stdout, stderr)


def _run(driver: Path, arguments: Sequence[object], environment: dict[str, str], said: str) -> None:
    for name, descriptor in STREAMS.items():
        os.dup2(os.open(f"{said}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a process that a command starts
    os.environ.update(environment)
    sys.argv = [str(driver), *map(str, arguments)]
    runpy.run_path(str(driver), run_name="__main__")
