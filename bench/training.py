"""Our trainer beside what people would use instead: `python -m bench training [--size tiny|large|7b] [--quick]`.

Same weights, conversations, optimizer and precision, one thread; every contender sees each conversation once. Each has
a process of its own. They take turns after every few steps where the machine has memory for all of them, or else one
after the other. bench/contenders.py has the contenders, bench/workload.py what they are given.

A result counts only if all contenders have the same loss before training (SAME_LOSS), the same number of supervised
tokens, and about the same mean loss over the run (SAME_CURVE; orders of examples differ).
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

SAME_LOSS, SAME_CURVE = 0.002, 0.05  # of the loss
OURS = "ours"
SPEED = "samples per CPU second"  # with one thread that of an idle machine, on a busy one too; on a GPU by the clock
NUM_BLOCKS = 3
COLUMNS = (
    "samples/s", "of a CPU second", "ratio", "memory", "peak MiB", "padding", "data wait", "mean loss", "last loss",
)  # fmt: skip


class _Worker:
    """One contender's process, which runs while it is asked to and sleeps between."""

    def __init__(self, name: str, stage: str, folder: Path, size: str, *, block: int, threads: int):
        self.name, self.errors = name, folder / f"{name.replace(' ', '-')}.txt"
        given = [name, stage, str(folder), size, str(block)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                       "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.contenders", *given],
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
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()


def measure(
    folder: Path, size_name: str, stage: str, *, threads: int = 1, names: Sequence[str] = tuple(CONTENDERS)
) -> dict[str, dict[str, Any]]:
    """What each contender's last line says. `folder` holds the workload."""
    size = QUICK if size_name == "quick" else SIZES[size_name]
    block = size.steps // NUM_BLOCKS if size.is_small else size.steps
    options: dict[str, Any] = {"block": block, "threads": threads}
    found: dict[str, dict[str, Any]] = {}
    workers: list[_Worker] = []
    for name in names:
        workers.append(_Worker(name, stage, folder, size_name, **options))
        if not size.is_small:
            found[name] = _run(workers, size.steps // block)[name]
            workers.clear()
    return {**found, **_run(workers, size.steps // block)}


def _run(workers: list[_Worker], num_blocks: int) -> dict[str, dict[str, Any]]:
    """All to their end, taking turns."""
    for _ in range(num_blocks):
        for worker in workers:
            worker.turn()
    found = {}
    for worker in workers:
        found[worker.name] = worker.turn()
        worker.process.wait()
    return found


def figures(told: dict[str, Any]) -> dict[str, Any]:
    """What is compared, of one contender."""
    seconds = sum(block["seconds"] for block in told["blocks"])
    losses = told["losses"]
    return {
        "samples/s": told["samples"] / seconds,
        SPEED: told["samples"] / (sum(block["cpu_seconds"] for block in told["blocks"]) or seconds),
        "peak MiB": told["peak_mib"],
        "padding": 1 - told["tokens"] / told["slots"],
        "data wait": sum(block["waited"] for block in told["blocks"]) / seconds,
        "mean loss": sum(losses) / len(losses),
        "first loss": told["before"],
        "last loss": told["after"],
        "samples": told["samples"],
        "supervised": sum(told["supervised"]),
        "losses": losses,
        "blocks": told["blocks"],
    }


def differences(found: dict[str, dict[str, Any]]) -> list[str]:
    """Why the contenders have not done the same; none: they have."""
    ours, wrong = found[OURS], []
    for name, other in found.items():
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


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    """A table as bench/RESULTS.md has it; `ratio` is ours to theirs in SPEED, `memory` in peak memory."""
    ours = found[OURS]
    print(f"\n{title}\n\n| contender | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, own in found.items():
        ratios = ours[SPEED] / own[SPEED], ours["peak MiB"] / own["peak MiB"]
        values = (own["samples/s"], own[SPEED], *ratios, own["peak MiB"], *(own[what] for what in COLUMNS[5:]))
        print(f"| {name} | " + " | ".join(f"{value:.{0 if value > 99 else 2}f}" for value in values) + " |")
    wrong = differences(found)
    print("\nsame work: " + ("; ".join(["NO, invalid", *wrong]) if wrong else "yes"), flush=True)


def training(sizes: Sequence[str] = ("tiny", "large"), stages: Sequence[str] = tuple(STAGES)) -> dict[str, float]:
    """Ratios of ours to the best of the others, in samples a second and peak memory.

    On a GPU the processes are on it together, or one after the other, as on the CPU; `7b` needs one.
    """
    ratios: dict[str, float] = {}
    results = Path("bench/results")
    results.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        shapes = QUICK if size == "quick" else SIZES[size]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_workload(folder, shapes)
            for stage in stages:
                found = {one: figures(told) for one, told in measure(folder, size, stage).items()}
                show(f"{stage}, {size}", found)
                record = {"size": vars(shapes), "invalid": differences(found), "contenders": found}
                (results / f"training-{size}-{stage.replace(' ', '-')}.json").write_text(json.dumps(record, indent=1))
                others = [own for one, own in found.items() if one != OURS]
                best = max(own[SPEED] for own in others)
                least = min(own["peak MiB"] for own in others)
                ratios[f"{size} {stage} ratio of samples/s"] = found[OURS][SPEED] / best
                ratios[f"{size} {stage} ratio of memory"] = found[OURS]["peak MiB"] / least
    return ratios
