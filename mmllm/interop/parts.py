"""What all readers of foreign models share: the parts that they return, and safe reading of files."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmllm.config import ProjectorConfig, VisionConfig
from mmllm.errors import MmllmError
from mmllm.model.tower import VisionTower
from projector import Projector


class ModelImportError(MmllmError):
    """A foreign model that cannot be imported; the message says what is missing or does not fit."""


@dataclass(frozen=True)
class ModelParts:
    """The loaded parts of a model, and the settings of its processor."""

    tower: VisionTower
    projector: Projector
    projector_config: ProjectorConfig
    language_model: Any
    tokenizer: Any
    vision: VisionConfig  # the tower's source, and the layout of pictures
    template: str | None  # None where the folder does not name one
    origin: dict[str, Any]  # the source of each part
    image_newline: Tensor | None = None


def tiled_layout(source: str, sizes: Sequence[Sequence[int]], side: int) -> VisionConfig:
    """The layout that resizes a picture to one of these (height, width) and cuts it into square views of `side` pixels.

    Raises ModelImportError where views do not fill a size.
    """
    if wrong := [list(pair) for pair in sizes if any(value % side or value < side for value in pair)]:
        raise ModelImportError(f"{source} resizes pictures to {wrong[0]} pixels, which views of {side} do not fill")
    grids = tuple((height // side, width // side) for height, width in sizes)
    return VisionConfig(source=source, image_mode="anyres", tile_grids=grids)


def main_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most numbers; float32 without any."""
    sizes: Counter[torch.dtype] = Counter()
    for value in weights.values():
        if value.is_floating_point():
            sizes[value.dtype] += value.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelImportError."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelImportError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelImportError(f"{path} must hold an object, got {type(data).__name__}")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle. A pickle with more than tensors is refused before it runs.

    Raises ModelImportError.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return tensors
    except pickle.UnpicklingError as error:
        raise ModelImportError(
            f"{path} is a pickle that holds code, or is damaged, and was not run: {str(error).splitlines()[0]}. "
            "Get the model as safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise ModelImportError(f"{path} cannot be read, it may be cut off: {error}; download it again") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder that transformers saved, in one file or in shards. Raises ModelImportError."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            if missing := [name for name in names if not (folder / name).is_file()]:
                raise ModelImportError(
                    f"{folder} lacks {len(missing)} of {len(names)} files of weights ({', '.join(missing[:3])}); "
                    "its download did not end, start it again"
                )
            return {key: value for name in names for key, value in read_tensors(folder / name).items()}
        if (folder / f"{stem}{suffix}").is_file():
            return read_tensors(folder / f"{stem}{suffix}")
    raise ModelImportError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, nor their index")
