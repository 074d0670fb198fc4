"""A feature cache of a folder of pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from mmllm.batch import Example
from mmllm.inference.engine import Engine
from mmllm.training.features import FeatureCache

CPU = torch.device("cpu")


def open_cache(checkpoint: Path, pictures: Path, folder: Path) -> FeatureCache:
    examples = [Example(path.name, "", (), (str(path),)) for path in sorted(pictures.glob("*.png"))]
    engine = Engine.load(checkpoint, device="cpu")
    return FeatureCache(engine.model, engine.processor, examples, folder)
