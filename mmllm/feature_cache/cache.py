"""Cached features: a frozen tower's patch tokens for each training picture, so that training steps read them from disk.

A row is named by a hash of the picture's content, the folder by a hash of tower and transform, so data sets, runs and
ranks share rows. `encoder.py` computes missing rows; `files.py` defines how rows are stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.batch import Example, ImageSource
from mmllm.config import ConfigError
from mmllm.data.sources import DataError
from mmllm.feature_cache.files import NUM_FILES, FeatureFile, PictureHashes, file_of, row_checksums
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.tower import VisionTower
from mmllm.model.vlm import VisionLanguageModel

VERIFIED_BYTES = 8 * 10**9  # a cache up to this size is read in seconds, so it is verified when it is opened


class FeatureCache:
    """The patch tokens [P, Dv] in bfloat16 of those pictures that are on the disk.

    Attributes:
        images: the pictures of the run, each once: paths or bytes.
        row_names: the SHA-256 of each picture, which names its row.
        shape: (P, Dv), patches and width of the tower.
        returns_zeros: whether `get` returns zeros; `mmllm plan` needs the memory, not the values.
    """

    def __init__(self, images: Sequence[str | bytes], shape: tuple[int, int], root: Path, key: str):
        """Opens the cache in the folder `root` / `key`, which need not exist; `key` names tower and transform."""
        self.root, self.folder = root, root / key
        self.shape, self.row_length = shape, shape[0] * shape[1]
        self.returns_zeros = False
        self.images = list(dict.fromkeys(images))
        hashes = PictureHashes(root / "pictures.sqlite" if root.is_dir() else None)
        self.row_names = dict(zip(self.images, hashes.of(self.images), strict=True))
        hashes.close()
        self.files = [self._open(number) for number in range(NUM_FILES)]
        self.names_by_file: list[list[str]] = [[] for _ in range(NUM_FILES)]
        for name in sorted(set(self.row_names.values())):
            self.names_by_file[file_of(name)].append(name)
        if self.verifies:
            damaged = sum(file.drop_damaged(names) for file, names in zip(self.files, self.names_by_file, strict=True))
            if damaged:
                print(f"{self.folder}: {damaged} rows are damaged and will be encoded anew")

    def _open(self, number: int) -> FeatureFile:
        file = FeatureFile(self.folder, number, self.row_length)
        file.read()
        return file

    def reopen(self, number: int) -> FeatureFile:
        """Reads one file again, because another process may have added rows."""
        file = self.files[number] = self._open(number)
        if self.verifies:
            file.drop_damaged(self.names_by_file[number])
        return file

    @property
    def verifies(self) -> bool:
        """Whether all rows are verified by checksum at the start; `get` always verifies the rows that it reads."""
        return sum(map(len, self.names_by_file)) * self.row_bytes <= VERIFIED_BYTES

    @property
    def row_bytes(self) -> int:
        return 2 * self.row_length

    @property
    def num_missing(self) -> int:
        return sum(
            name not in file.rows
            for file, names in zip(self.files, self.names_by_file, strict=True)
            for name in names
        )  # fmt: skip

    @property
    def missing_bytes(self) -> int:
        return self.num_missing * self.row_bytes

    def get(self, images: Sequence[ImageSource]) -> Tensor:
        """Patch tokens of these images, [N, P, Dv] in float32. Raises DataError if a row is damaged."""
        if self.returns_zeros:
            return torch.zeros(len(images), *self.shape)
        names = [self.row_names[_path_or_bytes(image)] for image in images]
        file_numbers = np.array([file_of(name) for name in names])
        out = np.empty((len(names), self.row_length), np.int16)
        for number in np.unique(file_numbers):
            file, positions = self.files[number], np.flatnonzero(file_numbers == number)
            rows = np.array([file.rows[names[position]] for position in positions])
            out[positions] = values = file.values[rows]
            if (row_checksums(values) != file.checksums[rows]).any():
                raise DataError(
                    f"{file.data} has been damaged since it was written; remove {file.data.name} and "
                    f"{file.index.name} in {self.folder}, and start again: they are encoded anew"
                )
        return torch.from_numpy(out).view(torch.bfloat16).view(len(names), *self.shape).float()


def open_cache(
    model: VisionLanguageModel, processor: VisionLanguageProcessor, examples: Sequence[Example], root: Path
) -> FeatureCache:
    """The cache of the pictures of these examples, for the model's tower. Nothing is written.

    Raises ConfigError if the model makes several views of a picture, OSError if a picture cannot be read.
    """
    if model.layout.has_newline:
        raise ConfigError(
            "data.cache_features keeps one view of each picture, but this model has more (model.vision.image_mode "
            "anyres or native); take one of the two out"
        )
    tower = model.vision_tower
    images = [_path_or_bytes(image) for example in examples for image in example.images]
    return FeatureCache(images, (tower.num_patches, tower.width), root, cache_key(tower, processor))


def _path_or_bytes(image: ImageSource) -> str | bytes:
    return image if isinstance(image, bytes) else str(image)


_NAMES = ("source", "_name_or_path", "name_or_path", "transformers_version", "text_cfg", "text_config")


def _without_names(value: Any) -> Any:
    """A tower's description without its name, its origin and its text tower."""
    if isinstance(value, dict):
        return {key: _without_names(inner) for key, inner in value.items() if key not in _NAMES}
    return [_without_names(inner) for inner in value] if isinstance(value, list | tuple) else value


def cache_key(tower: VisionTower, processor: VisionLanguageProcessor) -> str:
    """The hash of everything that affects a feature: the tower's weights and config, and the image transform.

    Names and paths are left out, so a tower that was moved or renamed keeps its key.
    """
    digest = hashlib.sha256()
    for name, value in tower.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().float().numpy().tobytes())
    for description in (processor.image_processor.to_dict(), tower.spec.to_json()):
        digest.update(json.dumps(_without_names(description), sort_keys=True, default=str).encode())
    return f"features-{digest.hexdigest()[:20]}"
