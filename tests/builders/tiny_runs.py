"""Small real runs: data in LLaVA's format, the settings of a stage on it, and what a run leaves behind."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mmllm.batching.sampler import IndexedSampler, rank_slice
from mmllm.config import StageConfig
from mmllm.config.file import load_config
from mmllm.fault_points import KILL_AT
from tests.builders.launches import forkserver
from tests.builders.tiny import model_config

COLORS = ("red", "green", "blue", "yellow", "white")
RATES = {"projector": 0.02, "language": 0.01}


def _row(name: str, images: list[str], *turns: tuple[str, str]) -> dict[str, Any]:
    spoken = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    row: dict[str, Any] = {"id": name, "conversations": spoken}
    return {**row, "image": images} if images else row


def make_data(folder: Path) -> Path:
    """`train.json`: ten rows with a picture, two with a second one in a later turn, four without. `val.json`: three."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    rows = []
    for number in range(10):
        color = COLORS[number % 5]
        turns = [("<image>\nwhat is in the picture?", f"a {color} circle" + " above a small square" * (number % 3))]
        rows.append(_row(f"one-{number}", [f"{number}.png"], *turns, *[("is it large?", "no")] * (number % 2)))
    later = (("<image>\nwhat is it?", "a square"), ("and <image>?", "a small blue circle"))
    rows += [_row(f"two-{number}", [f"{number}.png", f"{number + 10}.png"], *later) for number in range(2)]
    rows += [_row(f"text-{color}", [], (f"what color is the {color} one?", color)) for color in COLORS[:4]]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "val.json").write_text(json.dumps([rows[10], rows[12], rows[1]]))
    return folder


def write_settings(path: Path, parts: Path, data: Path, *, stage: str = "stage2", train: tuple[str, ...]) -> Path:
    """A config file of six steps of four examples."""
    settings = {
        "stage": stage,
        "out": str(path.parent / "out"),
        "seed": 3,
        "model": model_config(parts).model_dump(mode="json", exclude_none=True),
        "data": {"train": [{"path": str(data / "train.json")}], "max_length_tokens": 512},
        "train": list(train),
        "optim": {"learning_rates": {part: RATES[part] for part in train}, "max_steps": 6},
        "compute": {"batch_size": 4, "num_threads": 1},
        "validation": {"num_samples": 2},
        "log": {"every_steps": 1},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def settings_of(path: Path, out: Path, *overrides: str) -> StageConfig:
    config = load_config(path, [f"out={out}", *overrides])
    assert isinstance(config, StageConfig)
    return config


def train_in_process(path: Path, out: Path, *overrides: str) -> Path:
    """A whole run in this process."""
    from accelerate.state import AcceleratorState

    from mmllm.stages.run import run

    AcceleratorState._reset_state(reset_partial_state=True)
    run(settings_of(path, out, *overrides))
    return out


def _train_and_die(code: str, path: Path, out: Path, overrides: tuple[str, ...]) -> None:
    """In a process of its own: runs this code, which sets when the process kills itself, and then the training."""
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a process that a command starts
    exec(code, {"out": out})
    train_in_process(path, out, *overrides)


def start_in_own_process(code: str, path: Path, out: Path, *overrides: str) -> Any:
    """A process that runs some code and then trains; forked from a server that has imported what is slow to import."""
    process = forkserver().Process(target=_train_and_die, args=(code, path, out, overrides))
    process.start()
    return process


def train_and_die(fault_point: str, path: Path, out: Path, *overrides: str) -> int:
    """How a run ended that is killed at this point: the negative number of the signal, or 0 if it never came there."""
    process = start_in_own_process(f"import os; os.environ[{KILL_AT!r}] = {fault_point!r}", path, out, *overrides)
    process.join()
    return int(process.exitcode)


def weights_of(out: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, an adapter's with them."""
    files = [out / "model.safetensors", *(out / "adapter").glob("*.safetensors")]
    return {name: value for file in files for name, value in load_file(file).items()}


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[float]:
    return [row["loss"] for row in log_of(out) if "loss" in row]


def streamed(data: Path) -> list[str]:
    lines = data / "train.jsonl"
    if not lines.exists():
        lines.write_text("\n".join(json.dumps(row) for row in json.loads((data / "train.json").read_text())))
    return [f"data.train=[{{path: {lines}, streaming: true}}]"]


UNGROUPED = "data.group_by_length=false"


def mixed_seed() -> int:
    """A seed whose first steps give two ranks of two: pictures on one rank and none on the other, and both on one."""
    for seed in range(200):
        order = IndexedSampler(16, 4, seed)
        shares = [
            [sorted(index >= 12 for index in rank_slice(order.batch(step), rank, 2)) for rank in (0, 1)]
            for step in range(4)
        ]
        if any(pair in ([[True, True], [False, False]], [[False, False], [True, True]]) for pair in shares) and any(
            [False, True] in pair for pair in shares
        ):
            return seed
    raise AssertionError("no seed mixes pictures and text in this way")
