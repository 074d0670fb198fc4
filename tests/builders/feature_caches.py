"""A feature cache of a folder of pictures, and a slow filling of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mmllm.batch import Example
from mmllm.inference.engine import Engine
from mmllm.training import features
from mmllm.training.features import FeatureCache

CPU = torch.device("cpu")


def open_cache(checkpoint: Path, pictures: Path, folder: Path) -> FeatureCache:
    examples = [Example(path.name, "", (), (str(path),)) for path in sorted(pictures.glob("*.png"))]
    engine = Engine.load(checkpoint, device="cpu")
    return FeatureCache(engine.model, engine.processor, examples, folder)


def fill_slowly(checkpoint: Path, pictures: Path, folder: Path, rank: int, world_size: int, seconds: float) -> None:
    """In a process of its own: fills the cache two pictures at a time, and sleeps before each two."""
    encode = features.FeatureCache._encode

    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return encode(*given)

    features.CHUNK = 2
    features.FeatureCache._encode = slow  # type: ignore[method-assign]
    cache = open_cache(checkpoint, pictures, folder)
    print("ready", flush=True)
    cache.fill(CPU, rank=rank, world_size=world_size)
    print("missing", cache.num_missing, flush=True)
