"""A feature cache of a folder of pictures, and a slow filling of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mmllm.batch import Example
from mmllm.feature_cache import encoder
from mmllm.feature_cache.cache import open_cache
from mmllm.feature_cache.encoder import FeatureEncoder
from mmllm.inference.engine import Engine

CPU = torch.device("cpu")


def open_encoder(checkpoint: Path, pictures: Path, folder: Path) -> FeatureEncoder:
    """The encoder of a checkpoint's tower and, in its `cache`, what the folder holds for these pictures."""
    examples = [Example(path.name, "", (), (str(path),)) for path in sorted(pictures.glob("*.png"))]
    engine = Engine.load(checkpoint, device="cpu")
    cache = open_cache(engine.model, engine.processor, examples, folder)
    return FeatureEncoder(cache, engine.model.vision_tower, engine.processor)


def fill_slowly(checkpoint: Path, pictures: Path, folder: Path, rank: int, world_size: int, seconds: float) -> None:
    """In a process of its own: fills the cache two pictures at a time, and sleeps before each two."""
    encode = encoder.FeatureEncoder._encode

    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return encode(*given)

    encoder.CHUNK = 2
    encoder.FeatureEncoder._encode = slow  # type: ignore[method-assign]
    filler = open_encoder(checkpoint, pictures, folder)
    print("ready", flush=True)
    filler.fill(CPU, rank=rank, world_size=world_size)
    print("missing", filler.cache.num_missing, flush=True)
