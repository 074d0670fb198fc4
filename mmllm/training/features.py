"""A cache of what the frozen tower says about each training image, memory-mapped, so that no step computes it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.batch import Example
from mmllm.inference.engine import Engine, load_pixels

CHUNK = 128


def _reserve(path: Path, num_bytes: int) -> None:
    """A file of this size, its room on disk taken: writing into a memory map on a full disk would kill the process."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError:
        path.unlink(missing_ok=True)
        raise


class FeatureCache:
    """Patch tokens [images, P, Dv] in bfloat16, in a file named by the hash of tower, transform and image bytes."""

    def __init__(self, engine: Engine, examples: Sequence[Example], folder: Path):
        self.paths = sorted({str(image) for example in examples for image in example.images})
        self.rows = {path: row for row, path in enumerate(self.paths)}
        tower = engine.model.vision_tower
        shape = (len(self.paths), tower.num_patches, tower.width)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"features-{self._key(engine)}.bin"
        self.was_there = self.file.is_file()
        if not self.was_there and self.paths:
            self._fill(engine, shape)
        # bfloat16 is stored as its bits: NumPy has no such type
        self.values = np.memmap(self.file, np.int16, "r", shape=shape) if self.paths else np.zeros(shape, np.int16)

    def _key(self, engine: Engine) -> str:
        digest = hashlib.sha256()
        for name, value in engine.model.vision_tower.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().float().numpy().tobytes())
        transform: Any = engine.processor.image_processor
        digest.update(json.dumps(transform.to_dict(), sort_keys=True, default=str).encode())
        digest.update(json.dumps(engine.model.vision_tower.spec.to_json(), sort_keys=True).encode())
        for path in self.paths:
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
        return digest.hexdigest()[:20]

    @torch.inference_mode()
    def _fill(self, engine: Engine, shape: tuple[int, int, int]) -> None:
        partial = self.file.with_name(f"{self.file.name}.{os.getpid()}.part")
        _reserve(partial, int(np.prod(shape)) * np.dtype(np.int16).itemsize)
        values = np.memmap(partial, np.int16, "r+", shape=shape)
        device = engine.model.get_input_embeddings().weight.device
        tower = engine.model.vision_tower.eval()
        for start in range(0, len(self.paths), CHUNK):
            paths = self.paths[start : start + CHUNK]
            features = tower(load_pixels(engine.processor, paths).to(device))
            values[start : start + len(paths)] = features.cpu().to(torch.bfloat16).view(torch.int16).numpy()
        values.flush()
        del values
        partial.replace(self.file)

    @property
    def num_bytes(self) -> int:
        return int(self.values.nbytes)

    def get(self, images: Sequence[Any]) -> Tensor:
        """Patch tokens of these images, [N, P, Dv] in float32."""
        rows = [self.rows[str(image)] for image in images]
        return torch.from_numpy(self.values[rows]).view(torch.bfloat16).float()
