"""Our trainer beside its alternatives: `python -m bench training [--size tiny|large|7b] [--quick]`.

All contenders have the same weights, conversations, optimizer and precision, one thread, and see each conversation
once. Each has its own process. Small ones take turns after every few steps; large ones, for which memory is too small
together, run one after the other. The contenders are in bench/contenders.py, their weights and data in
bench/workload.py.

A result is valid only if all contenders have the same loss before training (SAME_LOSS), the same number of supervised
tokens, and about the same mean loss over the run (SAME_CURVE: their orders of examples differ).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contenders import CONTENDERS
from bench.workload import QUICK, SIZES, STAGES, write_workload

SAME_LOSS, SAME_CURVE = 0.002, 0.05  # relative differences of losses
OURS = "ours"
SPEED = "samples per CPU second"  # does not depend on other load of the machine; on a GPU wall time
NUM_BLOCKS = 3
COLUMNS = (
    "samples/s", "of a CPU second", "ratio", "memory", "peak MiB", "padding", "data wait", "mean loss", "last loss",
)  # fmt: skip


class _Worker:
    """The process of one contender, which runs in its turns and waits between them."""

    def __init__(self, name: str, stage: str, folder: Path, size: str, *, block: int, threads: int):
        self.name, self.errors = name, folder / f"{name.replace(' ', '-')}.txt"
        arguments = [name, stage, str(folder), size, str(block)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                       "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.contenders", *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
        self.read()

    def read(self) -> dict[str, Any]:
        """The next JSON line. Raises RuntimeError where the process has died."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("@"):
                return dict(json.loads(line[1:]))
        raise RuntimeError(f"{self.name} died:\n{self.errors.read_text()[-2000:]}")

    def turn(self) -> dict[str, Any]:
        """Lets the contender run its next block of steps; returns its message."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()


def measure(
    folder: Path, size_name: str, stage: str, *, threads: int = 1, names: Sequence[str] = tuple(CONTENDERS)
) -> dict[str, dict[str, Any]]:
    """The last message of each contender. `folder` holds the workload."""
    size = QUICK if size_name == "quick" else SIZES[size_name]
    block = size.steps // NUM_BLOCKS if size.is_small else size.steps
    options: dict[str, Any] = {"block": block, "threads": threads}
    results: dict[str, dict[str, Any]] = {}
    workers: list[_Worker] = []
    for name in names:
        workers.append(_Worker(name, stage, folder, size_name, **options))
        if not size.is_small:
            results[name] = _run(workers, size.steps // block)[name]
            workers.clear()
    return {**results, **_run(workers, size.steps // block)}


def _run(workers: list[_Worker], num_blocks: int) -> dict[str, dict[str, Any]]:
    """Runs all workers to their end, in turns; returns the last message of each."""
    for _ in range(num_blocks):
        for worker in workers:
            worker.turn()
    results = {}
    for worker in workers:
        results[worker.name] = worker.turn()
        worker.process.wait()
    return results


def metrics_of(result: dict[str, Any]) -> dict[str, Any]:
    """The metrics of one contender, from its last message."""
    seconds = sum(block["seconds"] for block in result["blocks"])
    losses = result["losses"]
    return {
        "samples/s": result["samples"] / seconds,
        SPEED: result["samples"] / (sum(block["cpu_seconds"] for block in result["blocks"]) or seconds),
        "peak MiB": result["peak_mib"],
        "padding": 1 - result["tokens"] / result["slots"],
        "data wait": sum(block["waited"] for block in result["blocks"]) / seconds,
        "mean loss": sum(losses) / len(losses),
        "first loss": result["before"],
        "last loss": result["after"],
        "samples": result["samples"],
        "supervised": sum(result["supervised"]),
        "losses": losses,
        "blocks": result["blocks"],
    }


def differences(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """Why the contenders' work differs; empty where it is the same. `metrics` is by contender."""
    ours, wrong = metrics[OURS], []
    for name, other in metrics.items():
        wrong += [
            f"{name}: {what} {other[what]} against {ours[what]}"
            for what in ("samples", "supervised")
            if other[what] != ours[what]
        ]
        wrong += [
            f"{name}: {what} {other[what]:.4f} against {ours[what]:.4f}"
            for what, limit in (("first loss", SAME_LOSS), ("mean loss", SAME_CURVE), ("last loss", SAME_CURVE))
            if abs(other[what] / ours[what] - 1) > limit
        ]
    return wrong


def show(title: str, metrics: dict[str, dict[str, Any]]) -> None:
    """Prints a table for bench/RESULTS.md; `ratio` is ours to theirs in SPEED, `memory` in peak memory."""
    ours = metrics[OURS]
    print(f"\n{title}\n\n| contender | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, row in metrics.items():
        ratios = ours[SPEED] / row[SPEED], ours["peak MiB"] / row["peak MiB"]
        values = (row["samples/s"], row[SPEED], *ratios, row["peak MiB"], *(row[what] for what in COLUMNS[5:]))
        print(f"| {name} | " + " | ".join(f"{value:.{0 if value > 99 else 2}f}" for value in values) + " |")
    wrong = differences(metrics)
    print("\nsame work: " + ("; ".join(["NO, invalid", *wrong]) if wrong else "yes"), flush=True)


def training(sizes: Sequence[str] = ("tiny", "large"), stages: Sequence[str] = tuple(STAGES)) -> dict[str, float]:
    """Ratios of ours to the best of the others, in samples a second and peak memory.

    The size `7b` needs a GPU.
    """
    ratios: dict[str, float] = {}
    folder_of_results = Path("bench/results")
    folder_of_results.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        shapes = QUICK if size == "quick" else SIZES[size]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_workload(folder, shapes)
            for stage in stages:
                results = measure(folder, size, stage)
                metrics = {contender: metrics_of(result) for contender, result in results.items()}
                show(f"{stage}, {size}", metrics)
                record = {"size": vars(shapes), "invalid": differences(metrics), "contenders": metrics}
                (folder_of_results / f"training-{size}-{stage.replace(' ', '-')}.json").write_text(
                    json.dumps(record, indent=1)
                )
                others = [row for contender, row in metrics.items() if contender != OURS]
                best = max(row[SPEED] for row in others)
                least = min(row["peak MiB"] for row in others)
                ratios[f"{size} {stage} ratio of samples/s"] = metrics[OURS][SPEED] / best
                ratios[f"{size} {stage} ratio of memory"] = metrics[OURS]["peak MiB"] / least
    return ratios
