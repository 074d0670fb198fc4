"""A cache of what the frozen tower says about each training image, memory-mapped, so that no step computes it again."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.batch import Example
from mmllm.config import ConfigError
from mmllm.inference.engine import Engine, load_pixels

CHUNK = 128
_HASHED = "sha256:"


def _reserve(path: Path, num_bytes: int) -> None:
    """A file of this size, its room on disk taken: writing into a memory map on a full disk would kill the process."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _name(image: Any) -> str:
    """A picture's path, or the hash of its bytes where it stands inside a data file."""
    return f"{_HASHED}{hashlib.sha256(image).hexdigest()}" if isinstance(image, bytes) else str(image)


class FeatureCache:
    """Patch tokens [images, P, Dv] in bfloat16, in a file named by the hash of tower, transform and image bytes."""

    def __init__(self, engine: Engine, examples: Sequence[Example], folder: Path):
        if engine.model.layout.has_newline:
            fit = engine.model.layout.kind
            raise ConfigError(f"data.cache_features keeps one view of each picture, but model.vision.fit is {fit}; "
                              "take one of the two out")  # fmt: skip
        where: dict[str, tuple[int, int]] = {}
        for number, example in enumerate(examples):
            for place, image in enumerate(example.images):
                where.setdefault(_name(image), (number, place))
        self.names = sorted(where)
        self.rows = {name: row for row, name in enumerate(self.names)}
        tower = engine.model.vision_tower
        shape = (len(self.names), tower.num_patches, tower.width)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"features-{self._key(engine)}.bin"
        self.was_there = self.file.is_file()
        if not self.was_there and self.names:
            self._fill(engine, shape, (examples[n].images[place] for n, place in map(where.__getitem__, self.names)))
        # bfloat16 is stored as its bits: NumPy has no such type
        self.values = np.memmap(self.file, np.int16, "r", shape=shape) if self.names else np.zeros(shape, np.int16)

    def _key(self, engine: Engine) -> str:
        digest = hashlib.sha256()
        for name, value in engine.model.vision_tower.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().float().numpy().tobytes())
        transform: Any = engine.processor.image_processor
        digest.update(json.dumps(transform.to_dict(), sort_keys=True, default=str).encode())
        digest.update(json.dumps(engine.model.vision_tower.spec.to_json(), sort_keys=True).encode())
        for name in self.names:
            is_hash = name.startswith(_HASHED)
            digest.update(name.encode() if is_hash else hashlib.sha256(Path(name).read_bytes()).digest())
        return digest.hexdigest()[:20]

    @torch.inference_mode()
    def _fill(self, engine: Engine, shape: tuple[int, int, int], images: Iterator[Any]) -> None:
        partial = self.file.with_name(f"{self.file.name}.{os.getpid()}.part")
        _reserve(partial, int(np.prod(shape)) * np.dtype(np.int16).itemsize)
        values = np.memmap(partial, np.int16, "r+", shape=shape)
        device = engine.model.get_input_embeddings().weight.device
        tower = engine.model.vision_tower.eval()
        for start in range(0, shape[0], CHUNK):
            some = list(itertools.islice(images, CHUNK))
            features = tower(load_pixels(engine.processor, some)["pixel_values"].to(device))
            values[start : start + len(some)] = features.cpu().to(torch.bfloat16).view(torch.int16).numpy()
        values.flush()
        del values
        partial.replace(self.file)

    @property
    def num_bytes(self) -> int:
        return int(self.values.nbytes)

    def get(self, images: Sequence[Any]) -> Tensor:
        """Patch tokens of these images, [N, P, Dv] in float32."""
        rows = [self.rows[_name(image)] for image in images]
        return torch.from_numpy(self.values[rows]).view(torch.bfloat16).float()
