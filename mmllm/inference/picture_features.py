"""Image tokens of pictures, computed once for each picture: what the projector makes of what the vision tower sees.

A picture is known by the hash of its prepared pixels and of the transform that prepared them. Two files with the same
pixels are one picture; two pictures with the same path, size or metadata are two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.batch import PreparedImage
from mmllm.inference.byte_cache import ByteCache
from mmllm.model.image_tokens import Layout
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture of a request. Equal `key` means equal image tokens."""

    prepared: PreparedImage
    key: bytes
    num_tokens: int


def transform_key(processor: VisionLanguageProcessor) -> bytes:
    """The hash of the image transform and of the layout of views."""
    settings = f"{processor.image_processor.to_json_string()} {processor.layout} {processor.num_image_tokens}"
    return hashlib.blake2b(settings.encode(), digest_size=32).digest()


def picture_key(prepared: PreparedImage, transform: bytes) -> bytes:
    """The hash of everything of a picture that reaches the model."""
    digest = hashlib.blake2b(transform, digest_size=32)
    for name in sorted(prepared.inputs):
        value = prepared.inputs[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def count_tokens(layout: Layout, prepared: PreparedImage) -> int:
    """Image tokens of one picture."""
    shapes = layout.shapes(prepared.inputs.get("image_sizes"))
    return layout.num_tokens(shapes[0]) if shapes else layout.num_view_tokens


class PictureFeatures:
    """Image tokens [M, D] by picture, in no more than `max_bytes`. The scheduler's thread alone uses it."""

    def __init__(self, model: VisionLanguageModel, *, max_bytes: int):
        self.model = model
        self.cache: ByteCache[bytes, Tensor] = ByteCache(max_bytes)

    def of(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """The image tokens [M, D] of each picture. The tower runs once, on all that are not in the cache."""
        held: dict[bytes, Tensor] = {}
        missing: dict[bytes, Picture] = {}
        for picture in {picture.key: picture for picture in pictures}.values():
            if (tokens := self.cache.get(picture.key)) is None:
                missing[picture.key] = picture
            else:
                held[picture.key] = tokens
        computed = self._compute(list(missing.values())) if missing else []
        for key, tokens in zip(missing, computed, strict=True):
            held[key] = tokens
            self.cache.put(key, tokens, tokens.nbytes)
        return [held[picture.key] for picture in pictures]

    def _compute(self, pictures: Sequence[Picture]) -> list[Tensor]:
        joined = self.model.layout.join([picture.prepared.inputs for picture in pictures])
        inputs = {name: value.to(self.model.device) for name, value in joined.items()}
        sizes = inputs.get("image_sizes")
        tokens = self.model.project_images(self.model.encode_images(inputs["pixel_values"], sizes), sizes)
        # a clone: a part of a tensor would keep the memory of the whole batch
        return [part.clone() for part in tokens.split([picture.num_tokens for picture in pictures])]
