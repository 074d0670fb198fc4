"""Fills a feature cache: the tower encodes the pictures without a row. Rows written before a kill are kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from mmllm.data.sources import DataError
from mmllm.feature_cache.cache import FeatureCache
from mmllm.feature_cache.files import NUM_FILES, PictureHashes, has_locks
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.tower import VisionTower
from mmllm.training.memory import size_text

CHUNK = 128  # pictures that are encoded, and then written, together


class FeatureEncoder:
    """Encodes pictures on a device and writes them to the files of a cache."""

    def __init__(self, cache: FeatureCache, tower: VisionTower, processor: VisionLanguageProcessor):
        self.cache, self.tower, self.processor = cache, tower, processor
        self.images = {name: image for image, name in cache.row_names.items()}

    def fill(self, device: torch.device, *, rank: int = 0, world_size: int = 1) -> None:
        """Encodes missing rows. Processes of this and other runs take different files, and wait at the end.

        Raises DataError if the disk has too little room at the start, OSError if it fills up later.
        """
        cache, tower = self.cache, self.tower
        if not cache.num_missing:
            return
        self._check_room(is_main=rank == 0)
        cache.folder.mkdir(parents=True, exist_ok=True)
        if world_size > 1 and not has_locks(cache.folder):
            raise DataError(
                f"data.cache_features: {cache.folder} is on a file system without locks, where {world_size} processes "
                "cannot share one cache; give data.cache_folder=FOLDER on a local disk, or take data.cache_features out"
            )
        first = rank * NUM_FILES // world_size
        device_before, was_training = next((weight.device for weight in tower.parameters()), device), tower.training
        tower.to(device).eval()
        try:
            for wait in (False, True):  # first the files that no process holds, then what the other processes left
                for number in ((first + step) % NUM_FILES for step in range(NUM_FILES)):
                    if cache.names_by_file[number]:
                        self._fill_file(number, device, wait=wait)
        except KeyboardInterrupt:
            print(
                f"feature cache: stopped; what is encoded stays in {cache.folder}, and the next start goes on from it"
            )
            raise
        finally:
            tower.to(device_before).train(was_training)
        hashes = PictureHashes(cache.root / "pictures.sqlite")  # kept for the next start
        hashes.of(cache.images)
        hashes.close()
        if rank == 0 and cache.images:
            print(self._gain(device))

    def _check_room(self, *, is_main: bool) -> None:
        """Prints the size before anything is encoded. Raises DataError if the disk has too little room."""
        cache = self.cache
        cache.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache.root).free
        size = (
            f"{cache.num_missing:,} pictures x {size_text(cache.row_bytes)} = {size_text(cache.missing_bytes)} in "
            f"bf16; {size_text(free)} free in {cache.root}"
        )
        if cache.missing_bytes > free:
            raise DataError(f"data.cache_features: {size}. Give data.cache_folder=FOLDER on a larger disk, or take "
                            "data.cache_features out")  # fmt: skip
        if is_main:
            print(f"feature cache: {size}")
            others = [folder for folder in cache.root.glob("features-*") if folder != cache.folder]
            if others and not cache.folder.is_dir():
                print(f"feature cache: {len(others)} other folder(s) in {cache.root}: of other towers or transforms, "
                      "or of a release that named them by a path. What no run uses can be deleted")  # fmt: skip

    def _fill_file(self, number: int, device: torch.device, *, wait: bool) -> None:
        cache = self.cache
        with cache.files[number].locked(wait=wait) as is_locked:
            if not is_locked:
                return
            file = cache.reopen(number)  # another process may have added to it
            missing = [name for name in cache.names_by_file[number] if name not in file.rows]
            for start in range(0, len(missing), CHUNK):
                names = missing[start : start + CHUNK]
                file.add(names, self._encode([self.images[name] for name in names], device))
            file.read()

    @torch.inference_mode()
    def _encode(self, images: Sequence[str | bytes], device: torch.device) -> NDArray[Any]:
        """Rows [N, P * Dv] of bfloat16 numbers, as int16."""
        pixels = self.processor.load_pixels(images)["pixel_values"].to(device)
        dtype = next((weight.dtype for weight in self.tower.parameters()), pixels.dtype)
        rows: NDArray[Any] = self.tower(pixels.to(dtype)).cpu().to(torch.bfloat16).view(torch.int16).flatten(1).numpy()
        return rows

    def _gain(self, device: torch.device) -> str:
        """The speedup by the cache for one batch of pictures, as a text: the shortest of a few timings of each.

        A first read waits for the disk, but a run reads each row many times.
        """
        images, tower = self.cache.images[:16], self.tower
        device_before = next((weight.device for weight in tower.parameters()), device)
        tower.to(device)
        encode_seconds = _least_seconds(lambda: self._encode(images, device), tries=2)
        read_seconds = _least_seconds(lambda: self.cache.get(images), tries=4)
        tower.to(device_before)
        text = (
            f"feature cache: {len(images)} pictures in {1000 * read_seconds:.3g} ms instead of "
            f"{1000 * encode_seconds:.3g} ms to decode and encode them"
        )
        if read_seconds > encode_seconds:
            return f"{text}: it gains nothing with this tower; data.cache_features=false is faster and needs no disk"
        gain = encode_seconds / max(1e-9, read_seconds)
        return f"{text}: {gain:.3g} times as fast, once a row has been read from the disk"


def _least_seconds(work: Callable[[], Any], *, tries: int) -> float:
    """The shortest of several timings, since other work on the machine can only make them longer."""
    durations = []
    for _ in range(tries):
        begun = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begun)
    return min(durations)
