"""A cache of what the frozen tower says about each training picture, so that no step computes it again.

Rows are named by the picture's content, in a folder named by tower and transform: data sets, runs and ranks share them.
What was encoded stays, whoever is killed. mmllm/training/feature_files.py says how rows lie on the disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.batch import Example
from mmllm.config import ConfigError
from mmllm.data.sources import DataError
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.tower import VisionTower
from mmllm.model.vlm import VisionLanguageModel
from mmllm.training.feature_files import NUM_FILES, FeatureFile, PictureHashes, file_of, has_locks, sums
from mmllm.training.memory import size_text

CHUNK = 128
VERIFIED_AT_START = 8 * 10**9  # bytes that are read in seconds; every row is compared when it is used, too


class FeatureCache:
    """Patch tokens [images, P, Dv] in bfloat16. `fill` encodes what is missing; until then nothing is written."""

    def __init__(
        self, model: VisionLanguageModel, processor: VisionLanguageProcessor, examples: Sequence[Example], folder: Path
    ):
        if model.layout.has_newline:
            raise ConfigError(
                "data.cache_features keeps one view of each picture, but this model has more (model.vision.image_mode "
                "anyres or native); take one of the two out"
            )
        tower = self.tower = model.vision_tower
        self.processor, self.shape = processor, (tower.num_patches, tower.width)
        self.blank = False  # whether `get` gives zeros, for a plan of the run
        self.root, self.folder = folder, folder / _key(tower, processor)
        self.images = list(dict.fromkeys(_image(image) for example in examples for image in example.images))
        hashes = PictureHashes(folder / "pictures.sqlite" if folder.is_dir() else None)
        names = hashes.of(self.images)
        hashes.close()
        self.name_of = dict(zip(self.images, names, strict=True))
        self.names = sorted(set(names))
        self._read()
        if self.num_bytes <= VERIFIED_AT_START:
            damaged = sum(file.drop_damaged(mine) for file, mine in zip(self.files, self._by_file(), strict=True))
            if damaged:
                print(f"{self.folder}: {damaged} rows are damaged and will be encoded anew")

    def _read(self) -> None:
        self.files = [FeatureFile(self.folder, number, int(np.prod(self.shape))) for number in range(NUM_FILES)]
        for file in self.files:
            file.read()

    def _by_file(self) -> list[list[str]]:
        found: list[list[str]] = [[] for _ in range(NUM_FILES)]
        for name in self.names:
            found[file_of(name)].append(name)
        return found

    @property
    def row_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    @property
    def num_bytes(self) -> int:
        return len(self.names) * self.row_bytes

    @property
    def num_missing(self) -> int:
        return sum(name not in self.files[file_of(name)].rows for name in self.names)

    @property
    def missing_bytes(self) -> int:
        return self.num_missing * self.row_bytes

    def _check_room(self, *, is_first: bool) -> None:
        """Says the size before anything is encoded. Raises DataError where the disk has no room for it."""
        self.root.mkdir(parents=True, exist_ok=True)
        free, missing = shutil.disk_usage(self.root).free, self.num_missing
        told = (
            f"{missing:,} pictures x {size_text(self.row_bytes)} = {size_text(self.missing_bytes)} in bf16; "
            f"{size_text(free)} free in {self.root}"
        )
        if self.missing_bytes > free:
            raise DataError(f"data.cache_features: {told}. Give data.cache_folder=FOLDER on a larger disk, or take "
                            "data.cache_features out")  # fmt: skip
        if is_first:
            print(f"feature cache: {told}")
            others = [one for one in self.root.glob("features-*") if one != self.folder]
            if others and not self.folder.is_dir():
                print(f"feature cache: {len(others)} other folder(s) in {self.root}: of other towers or transforms, "
                      "or of a release that named them by a path. What no run uses can go")  # fmt: skip

    def fill(self, device: torch.device, *, rank: int = 0, world_size: int = 1) -> None:
        """Encodes what is missing. Processes, of this run or of others, take different files and wait at the end.

        Raises DataError where there is no room, OSError where the disk is full all the same.
        """
        if not self.num_missing:
            return
        self._check_room(is_first=rank == 0)
        self.folder.mkdir(parents=True, exist_ok=True)
        if world_size > 1 and not has_locks(self.folder):
            raise DataError(
                f"data.cache_features: {self.folder} is on a file system without locks, where {world_size} processes "
                "cannot share one cache; give data.cache_folder=FOLDER on a local disk, or take data.cache_features out"
            )
        wanted, first = self._by_file(), rank * NUM_FILES // world_size
        images = {name: image for image, name in self.name_of.items()}
        tower = self.tower
        home, was_training = next((one.device for one in tower.parameters()), device), tower.training
        tower.to(device).eval()
        try:
            for wait in (False, True):  # first those that nobody works on, then what others may have left
                for number in ((first + step) % NUM_FILES for step in range(NUM_FILES)):
                    if wanted[number]:
                        self._fill_file(number, wanted[number], images, device, wait=wait)
        except KeyboardInterrupt:
            print(f"feature cache: stopped; what is encoded stays in {self.folder}, and the next start goes on from it")
            raise
        finally:
            tower.to(home).train(was_training)
        self._remember()
        if rank == 0 and self.images:
            print(self._gain(device))

    def _fill_file(self, number: int, names: list[str], images: dict[str, Any], device: torch.device, *,
                   wait: bool) -> None:  # fmt: skip
        with self.files[number].locked(wait=wait) as is_mine:
            if not is_mine:
                return
            file = self.files[number] = FeatureFile(self.folder, number, int(np.prod(self.shape)))
            file.read()  # another process may have added to it
            if self.num_bytes <= VERIFIED_AT_START:
                file.drop_damaged(names)
            missing = [name for name in names if name not in file.rows]
            for start in range(0, len(missing), CHUNK):
                some = missing[start : start + CHUNK]
                file.add(some, self._encode([images[name] for name in some], device))
            file.read()

    @torch.inference_mode()
    def _encode(self, images: Sequence[Any], device: torch.device) -> Any:
        tower = self.tower
        pixels = self.processor.load_pixels(images)["pixel_values"].to(device)
        dtype = next((one.dtype for one in tower.parameters()), pixels.dtype)
        return tower(pixels.to(dtype)).cpu().to(torch.bfloat16).view(torch.int16).flatten(1).numpy()

    def _remember(self) -> None:
        """The hashes of pictures for the next start."""
        hashes = PictureHashes(self.root / "pictures.sqlite")
        hashes.of(self.images)
        hashes.close()

    def _gain(self, device: torch.device) -> str:
        """What a batch of pictures costs with the cache and without: the best of a few tries of each.

        A first read waits for the disk, and a run reads each row many times.
        """
        some, tower = self.images[:16], self.tower
        home = next((one.device for one in tower.parameters()), device)
        tower.to(device)
        encoded = _least_seconds(lambda: self._encode(some, device), tries=2)
        read = _least_seconds(lambda: self.get(some), tries=4)
        tower.to(home)
        text = (
            f"feature cache: {len(some)} pictures in {1000 * read:.3g} ms instead of {1000 * encoded:.3g} ms to decode "
            f"and encode them"
        )
        if read > encoded:
            return f"{text}: it gains nothing with this tower; data.cache_features=false is faster and needs no disk"
        return f"{text}: {encoded / max(1e-9, read):.3g} times as fast, once a row has been read from the disk"

    def get(self, images: Sequence[Any]) -> Tensor:
        """Patch tokens of these images, [N, P, Dv] in float32. Raises DataError where a row has been damaged."""
        if self.blank:
            return torch.zeros(len(images), *self.shape)
        names = [self.name_of[_image(image)] for image in images]
        places = np.array([file_of(name) for name in names])
        out = np.empty((len(names), int(np.prod(self.shape))), np.int16)
        for number in np.unique(places):
            file, mine = self.files[number], np.flatnonzero(places == number)
            at = np.array([file.rows[names[one]] for one in mine])
            out[mine] = rows = file.values[at]
            if (sums(rows) != file.sums[at]).any():
                raise DataError(
                    f"{file.data} has been damaged since it was written; remove {file.data.name} and "
                    f"{file.index.name} in {self.folder}, and start again: they are encoded anew"
                )
        return torch.from_numpy(out).view(torch.bfloat16).view(len(names), *self.shape).float()


def _image(image: Any) -> Any:
    return image if isinstance(image, bytes) else str(image)


def _least_seconds(work: Callable[[], Any], *, tries: int) -> float:
    """The CPU's or the GPU's time is what is compared, and a busy machine takes some of it away: so the least."""
    taken = []
    for _ in range(tries):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)


_NAMES = ("source", "_name_or_path", "name_or_path", "transformers_version", "text_cfg", "text_config")


def _without_names(value: Any) -> Any:
    """A tower's description without what it is called, where it came from, and what belongs to its text side."""
    if isinstance(value, dict):
        return {key: _without_names(inner) for key, inner in value.items() if key not in _NAMES}
    return [_without_names(inner) for inner in value] if isinstance(value, list | tuple) else value


def _key(tower: VisionTower, processor: VisionLanguageProcessor) -> str:
    """The hash of what decides a feature: the tower's weights, how it computes, and what is done to a picture before.

    Not of names and paths: a tower that has been moved, or is named otherwise, is the same one.
    """
    digest = hashlib.sha256()
    for name, value in tower.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().float().numpy().tobytes())
    for described in (processor.image_processor.to_dict(), tower.spec.to_json()):
        digest.update(json.dumps(_without_names(described), sort_keys=True, default=str).encode())
    return f"features-{digest.hexdigest()[:20]}"
