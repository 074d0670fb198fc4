"""How training's speed and memory grow: `python -m bench growth`, plots in bench/plots/growth.png.

Our stage and our loop's step, on the tiny shapes of bench/workload.py, stage 2, one thread. The curves are samples a
second by batch size, length, pictures per example and worker processes, and peak memory by the number of rows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.workload import NUM_PICTURES, QUICK, SIZES, WORDS, write_workload

PLOT = Path("bench/plots/growth.png")
ROUNDS, WARM_UP = 3, 1  # timed steps, and steps before them
BATCH, NUM_WORDS = 8, 100
BATCHES, LENGTHS, PICTURES, WORKERS = (1, 2, 4, 8, 16, 32), (64, 128, 256, 512, 1024, 2048), (0, 1, 2, 4, 8), (0, 1, 2)
ROWS = (1_000, 10_000, 100_000)


def _write_rows(path: Path, count: int, *, num_words: int = NUM_WORDS, pictures: int = 1) -> Path:
    """Writes conversations of one turn, all of the same length. A word is one token."""
    answer = " ".join(WORDS[number % len(WORDS)] for number in range(num_words))
    rows = []
    for number in range(count):
        names = [f"{(number + other) % NUM_PICTURES}.jpg" for other in range(pictures)]
        question = "<image>\n" * pictures + "what is it?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "conversations": turns} | ({"image": names} if pictures else {}))
    path.write_text(json.dumps(rows))
    return path


def _run(folder: Path, rows: Path, *, batch: int = BATCH, workers: int = 0, steps: int = WARM_UP + ROUNDS) -> Any:
    """The run on these rows that `mmllm train` would build."""
    from mmllm.config import StageConfig
    from mmllm.distributed.ranks import build_accelerator
    from mmllm.stages.registry import build_stage
    from mmllm.training.loop import Run

    train = ["projector", "language"] if "<image>" in rows.open().read(1000) else ["language"]
    values = {
        "stage": "stage2", "out": str(folder / "out"), "train": train,
        "model": {"checkpoint": str(folder / "checkpoint")},
        "data": {"train": [{"path": str(rows)}], "num_workers": workers, "max_length_tokens": 4096},
        "optim": {"learning_rates": dict.fromkeys(train, 1e-4), "max_steps": steps},
        "compute": {"batch_size": batch, "precision": "bf16"},
    }  # fmt: skip
    config = StageConfig.model_validate(values)
    return Run(config, build_stage(config), build_accelerator(config), lambda: build_stage(config))


def _speed(
    folder: Path,
    *,
    batch: int = BATCH,
    workers: int = 0,
    words: int = NUM_WORDS,
    pictures: int = 1,
    by_clock: bool = False,
) -> float:
    """Samples a second: of CPU time, or with `by_clock` of wall time, where worker processes take part. Median step."""
    rows = _write_rows(folder / "grown.json", batch * 2, num_words=words, pictures=pictures)
    run = _run(folder, rows, batch=batch, workers=workers)
    clock = time.perf_counter if by_clock else time.process_time
    data, seconds = run.batches.start(0), []
    for step in range(WARM_UP + ROUNDS):
        begun = clock()
        run.stepper.step(step, data)
        seconds.append(clock() - begun)
    return batch / statistics.median(seconds[WARM_UP:])


def _peak(folder: Path, rows: Path) -> float:
    """Peak MiB of a run above that of its imports, measured in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", __name__, str(folder), str(rows)], env=environment, check=True,
                          capture_output=True, text=True)  # fmt: skip
    return float(done.stdout.split()[-1])


def growth(*, is_quick: bool = False) -> dict[str, float]:
    """Measures all curves; writes the plots and bench/results/growth.json."""
    import torch

    torch.set_num_threads(1)
    num_values = 2 if is_quick else None
    curves: dict[str, dict[int, float]] = {}

    def grow(what: str, values: Sequence[int], measure: Callable[[int], float]) -> None:
        curves[what] = {}
        for value in values[:num_values]:
            curves[what][value] = measure(value)
            print(f"{what}, {value}: {curves[what][value]:.1f}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workload(folder, QUICK if is_quick else SIZES["tiny"])
        grow("samples/s by batch size", BATCHES, lambda value: _speed(folder, batch=value))
        grow("samples/s by tokens, no picture", LENGTHS, lambda value: _speed(folder, words=value - 4, pictures=0))
        grow("samples/s by pictures", PICTURES, lambda value: _speed(folder, pictures=value))
        grow("samples/s by worker processes", WORKERS, lambda value: _speed(folder, workers=value, by_clock=True))
        many = folder / "many.json"
        grow("peak MiB by rows", ROWS, lambda value: _peak(folder, _write_rows(many, value, num_words=30)))
    if not is_quick:
        _plot(curves)
    results = Path("bench/results")
    results.mkdir(parents=True, exist_ok=True)
    (results / "growth.json").write_text(json.dumps(curves, indent=1))
    return {f"{what} {x} s": y for what, curve in curves.items() for x, y in curve.items()}


def _plot(curves: dict[str, dict[int, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3), layout="constrained")
    axes: Sequence[Any] = figure.subplots(1, len(curves))
    for axis, (what, curve) in zip(axes, curves.items(), strict=True):
        value, by = what.split(" by ")
        axis.plot(list(curve), list(curve.values()), marker="o", clip_on=False)
        axis.set_xlabel(by)
        axis.set_title(value, fontsize="medium")
        axis.set_ylim(0, 1.1 * max(curve.values()))
        if 0 not in curve:
            axis.set_xscale("log", base=2)
        axis.set_xticks(list(curve), [f"{x:,}" for x in curve])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=80)


def _most_resident_kib() -> int:
    """The peak of this process. (`ru_maxrss` would include that of the process that started it.)"""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _main(folder: str, rows: str) -> None:
    """Prints the peak MiB of a run above that of its imports."""
    before = _most_resident_kib()
    run = _run(Path(folder), Path(rows))
    data = run.batches.start(0)
    for step in range(WARM_UP + ROUNDS):
        run.stepper.step(step, data)
    print((_most_resident_kib() - before) / 1024)


if __name__ == "__main__":
    _main(*sys.argv[1:])
