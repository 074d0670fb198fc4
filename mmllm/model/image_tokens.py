"""How a picture becomes views for the tower, and the order of its tokens in the text.

`single` is one view of the tower's own size, so every picture has the same number of tokens. With `tiles` and `native`
the number depends on the picture, and a learned newline token ends each row, so that the LLM can tell rows apart.

Shapes: `N` pictures, `W` views of all pictures, `P` patches and `M` tokens of a view, `Dv` vision width, `D` LLM width.
A picture's size is (height, width) in pixels, upright; its shape is its row of `image_sizes` [N, 2].
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.config import ConfigError, VisionConfig
from mmllm.kernels.large_pictures import MAX_ORDINARY_PIXELS, fit_as, fit_inside, num_pixels_as, resize
from mmllm.model.tower import INTERPOLATIONS, TowerSpec, VisionTower
from projector import Projector

Pair = tuple[int, int]

# (rows, columns) of LLaVA-NeXT's tiles, https://llava-vl.github.io/blog/2024-01-30-llava-next/
NEXT_GRIDS: tuple[Pair, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(frozen=True)
class Layout:
    """`single`: one view a picture, made square by cropping, padding or stretching."""

    num_view_tokens: int

    kind: ClassVar[str] = "single"
    has_newline: ClassVar[bool] = False

    @property
    def num_image_tokens(self) -> int | Callable[[Pair], int]:
        """Tokens of every picture, or a function from a picture's size to its tokens where they differ."""
        return self.num_view_tokens

    def num_tokens(self, shape: Pair) -> int:
        """Tokens of a picture of this shape."""
        return self.num_view_tokens

    def shapes(self, image_sizes: Tensor | None) -> list[Pair]:
        """`image_sizes` [N, 2] as pairs; empty for None. Raises ValueError for None where the layout needs them."""
        if image_sizes is None and self.has_newline:
            raise ValueError(f"pictures laid out as {self.kind} need image_sizes beside pixel_values")
        return [] if image_sizes is None else [(int(first), int(second)) for first, second in image_sizes.tolist()]

    def inputs(self, processed: Mapping[str, Any]) -> dict[str, Any]:
        """The model's inputs from the output of the image processor."""
        return {"pixel_values": processed["pixel_values"]}

    def prepare(self, transform: Any, picture: Image.Image, size: Pair) -> dict[str, Any]:
        """The model's inputs for one picture, computed in little more memory than they take.

        `size` is the original size; the picture may have been shrunk when read. Pictures of ordinary size go through
        the image processor unchanged.
        """
        if self.num_pixels(transform, size) > MAX_ORDINARY_PIXELS or picture.size != size[::-1]:
            return self.inputs(self.prepare_large(transform, picture, size))
        return self.inputs(transform([picture], return_tensors="pt"))

    def num_pixels(self, transform: Any, size: Pair) -> int:
        """The most pixels that the image processor would hold at once for a picture of this size."""
        return num_pixels_as(transform, size)

    def prepare_large(self, transform: Any, picture: Image.Image, size: Pair) -> Mapping[str, Any]:
        """What the image processor would give, up to rounding, in less memory."""
        no_resizing = {"do_resize": False, "do_pad": False, "do_center_crop": False}
        processed: Mapping[str, Any] = transform([fit_as(transform, picture)], **no_resizing, return_tensors="pt")
        return processed

    def join(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The inputs of several pictures, concatenated."""
        return {name: torch.cat([inputs[name] for inputs in prepared]) for name in prepared[0]}

    def encode(self, tower: VisionTower, pixel_values: Tensor, shapes: Sequence[Pair]) -> Tensor:
        """Patch tokens of all pictures: [N, C, H, W] -> [N, P, Dv]."""
        patches: Tensor = tower(pixel_values)
        return patches

    def project(self, projector: Projector, features: Tensor, shapes: Sequence[Pair], newline: Tensor | None) -> Tensor:
        """Tokens of all pictures, concatenated: [N, P, Dv] -> [N * M, D]."""
        tokens: Tensor = projector(features)
        return tokens.flatten(0, 1)

    def image_processor(self, spec: TowerSpec, image_mode: str) -> Any:
        """The tower's transform: `crop` keeps the center, `pad` pads with the mean color, `stretch` distorts."""
        from transformers import LlavaImageProcessor

        side = {"height": spec.image_size_px, "width": spec.image_size_px}
        return LlavaImageProcessor(
            do_pad=image_mode == "pad",
            size={"shortest_edge": spec.image_size_px} if image_mode == "crop" else side,
            do_center_crop=image_mode == "crop",
            crop_size=side,
            **_normalization(spec),
        )

    def to_json(self) -> dict[str, Any] | None:
        """The `values` of `build_layout`; None for `single`."""
        if self.kind == "single":
            return None
        values = {name: value for name, value in asdict(self).items() if name != "num_view_tokens"}
        return {"kind": self.kind, **values}


@dataclass(frozen=True)
class Tiles(Layout):
    """LLaVA-NeXT: the whole picture as one view, then its tiles, in the grid that fits it best.

    Tokens of the padding are dropped. A picture's shape is its size. https://arxiv.org/abs/2408.03326, section 3.2
    """

    view_size_px: int
    grids: tuple[Pair, ...]  # the (rows, columns) to choose from

    kind: ClassVar[str] = "tiles"
    has_newline: ClassVar[bool] = True

    @property
    def num_image_tokens(self) -> Callable[[Pair], int]:
        return self.num_tokens

    def num_tokens(self, shape: Pair) -> int:
        return _num_tile_tokens(self, shape)

    def grid(self, size: Pair) -> Pair:
        """(rows, columns) of the tiles of a picture of this size."""
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(size, self.pinpoints)
        return height // self.view_size_px, width // self.view_size_px

    @property
    def pinpoints(self) -> list[list[int]]:
        """(height, width) in pixels of each grid, as in transformers' `image_grid_pinpoints`."""
        return [[rows * self.view_size_px, columns * self.view_size_px] for rows, columns in self.grids]

    def inputs(self, processed: Mapping[str, Any]) -> dict[str, Any]:
        return {name: processed[name] for name in ("pixel_values", "image_sizes")}

    def num_pixels(self, transform: Any, size: Pair) -> int:
        return math.prod(size)

    def prepare_large(self, transform: Any, picture: Image.Image, size: Pair) -> Mapping[str, Any]:
        from transformers.image_processing_utils import get_patch_output_size

        (rows, columns), side, resample = self.grid(size), self.view_size_px, transform.resample
        whole = (columns * side, rows * side)
        height, width = get_patch_output_size(torch.empty(3, *size, device="meta"), whole[::-1], "channels_first")
        canvas = fit_inside(picture, (width, height), whole, resample)
        views = [resize(picture, (side, side), resample)]
        views += [
            canvas.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
            for row in range(rows)
            for column in range(columns)
        ]
        return {"pixel_values": _normalized(transform, views)[None], "image_sizes": torch.tensor([size])}

    def join(self, prepared: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Pads every picture with views of zeros to the largest number of views, as transformers does."""
        max_views = max(inputs["pixel_values"].shape[1] for inputs in prepared)
        return super().join(
            [{**inputs, "pixel_values": _pad_views(inputs["pixel_values"], max_views)} for inputs in prepared]
        )

    def encode(self, tower: VisionTower, pixel_values: Tensor, shapes: Sequence[Pair]) -> Tensor:
        """[N, views, C, H, W], padded to the largest number of views -> [W, P, Dv]."""
        counts = [1 + math.prod(self.grid(shape)) for shape in shapes]
        patches: Tensor = tower(torch.cat([views[:count] for views, count in zip(pixel_values, counts, strict=True)]))
        return patches

    def project(self, projector: Projector, features: Tensor, shapes: Sequence[Pair], newline: Tensor | None) -> Tensor:
        """[W, P, Dv] -> [tokens, D]."""
        assert newline is not None
        tokens: Tensor = projector(features)  # [W, M, D]
        views = tokens.split([1 + math.prod(self.grid(shape)) for shape in shapes])
        pictures = [self._arrange(views, shape, newline) for views, shape in zip(views, shapes, strict=True)]
        # empty slices: without pictures, projector and newline keep a gradient, which other ranks may wait for
        return torch.cat([*pictures, tokens[:0].flatten(0, 1), newline[None][:0]])

    def _arrange(self, views: Tensor, size: Pair, newline: Tensor) -> Tensor:  # [views, M, D] -> [tokens, D]
        from transformers.models.llava_next.modeling_llava_next import unpad_image

        side, (rows, columns) = math.isqrt(views.shape[1]), self.grid(size)
        tiles = views[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns)).permute(4, 0, 2, 1, 3)
        grid: Tensor = unpad_image(tiles.flatten(1, 2).flatten(2, 3), size)  # [D, rows of tokens, columns of tokens]
        lines = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], 2)
        return torch.cat([views[0], lines.flatten(1).T])

    def image_processor(self, spec: TowerSpec, image_mode: str) -> Any:
        from transformers import LlavaNextImageProcessor

        side = self.view_size_px
        return LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=self.pinpoints,
            **_normalization(spec),
        )


@functools.lru_cache(maxsize=65536)
def _num_tile_tokens(layout: Tiles, size: Pair) -> int:
    """Counts the tokens by arranging tokens of width 0."""
    rows, columns = layout.grid(size)
    views = torch.empty(1 + rows * columns, layout.num_view_tokens, 0)
    return len(layout._arrange(views, size, torch.empty(0)))


@dataclass(frozen=True)
class Native(Layout):
    """One view in the picture's aspect ratio, as large as a token budget allows. Its shape is (rows, columns).

    The newline that ends each row comes on top of the budget. NaFlex, https://arxiv.org/abs/2502.14786, section 2.4
    """

    patch_size_px: int
    token_stride: int  # patches along one side of a token
    max_tokens: int

    kind: ClassVar[str] = "native"
    has_newline: ClassVar[bool] = True

    @property
    def unit_px(self) -> int:
        """Pixels along one side of a token."""
        return self.patch_size_px * self.token_stride

    @property
    def num_image_tokens(self) -> Callable[[Pair], int]:
        return self.num_tokens_of_size

    def num_tokens_of_size(self, size: Pair) -> int:
        return self.num_tokens(self.shape(size))

    def num_tokens(self, shape: Pair) -> int:
        rows, columns = shape
        return rows * (columns + 1)

    def shape(self, size: Pair) -> Pair:
        """(rows, columns) of the tokens of a picture of this size."""
        return _native_shape(self, size)

    def inputs(self, processed: Mapping[str, Any]) -> dict[str, Any]:
        return {"pixel_values": processed["pixel_values"], "image_sizes": processed["spatial_shapes"]}

    def num_pixels(self, transform: Any, size: Pair) -> int:
        return math.prod(size)

    def prepare_large(self, transform: Any, picture: Image.Image, size: Pair) -> Mapping[str, Any]:
        rows, columns = self.shape(size)
        resized = resize(picture, (columns * self.unit_px, rows * self.unit_px), transform.resample)
        processed: Mapping[str, Any] = transform([resized], do_resize=False, return_tensors="pt")
        return processed

    def encode(self, tower: VisionTower, pixel_values: Tensor, shapes: Sequence[Pair]) -> Tensor:
        """[N, max_tokens, unit_px * unit_px * C], padded after the picture -> [patches of all pictures, Dv]."""
        patches: dict[int, Tensor] = {}
        for shape, indices in _by_shape(shapes).items():
            patches.update(zip(indices, tower(self.as_pixels(pixel_values[indices], shape)), strict=True))
        return torch.cat([patches[index] for index in range(len(shapes))])

    def as_pixels(self, pixel_values: Tensor, shape: Pair) -> Tensor:
        """Restores the pixels of pictures of one shape: [n, max_tokens, unit_px * unit_px * C] -> [n, C, H, W]."""
        rows, columns = shape
        side = self.unit_px
        cells = pixel_values[:, : rows * columns].unflatten(2, (side, side, -1)).unflatten(1, (rows, columns))
        pixels: Tensor = cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return pixels

    def project(self, projector: Projector, features: Tensor, shapes: Sequence[Pair], newline: Tensor | None) -> Tensor:
        """[patches of all pictures, Dv], or [0, P, Dv] without pictures -> [tokens, D]."""
        assert newline is not None
        if not shapes:
            return torch.cat([projector(features).flatten(0, 1), newline[None][:0]])
        stride = self.token_stride
        patches = features.split([rows * columns * stride**2 for rows, columns in shapes])
        lines_of: dict[int, Tensor] = {}
        for (rows, columns), indices in _by_shape(shapes).items():
            stacked = torch.stack([patches[index] for index in indices])
            tokens: Tensor = projector(stacked, (rows * stride, columns * stride))
            grid = tokens.unflatten(1, (rows, columns))  # [n, rows, columns, D]
            lines = torch.cat([grid, newline.expand(*grid.shape[:2], 1, -1)], 2)
            lines_of.update(zip(indices, lines.flatten(1, 2), strict=True))
        return torch.cat([lines_of[index] for index in range(len(shapes))])

    def image_processor(self, spec: TowerSpec, image_mode: str) -> Any:
        from transformers import Siglip2ImageProcessor

        return Siglip2ImageProcessor(patch_size=self.unit_px, max_num_patches=self.max_tokens, **_normalization(spec))


@functools.lru_cache(maxsize=65536)
def _native_shape(layout: Native, size: Pair) -> Pair:
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    height, width = get_image_size_for_max_num_patches(*size, layout.unit_px, layout.max_tokens)
    return height // layout.unit_px, width // layout.unit_px


def _normalized(transform: Any, views: Sequence[Image.Image]) -> Tensor:  # [views, C, H, W]
    pixels = torch.stack([torch.from_numpy(np.array(view)).permute(2, 0, 1) for view in views])
    mean, std = tuple(transform.image_mean), tuple(transform.image_std)
    normalized: Tensor = transform.rescale_and_normalize(
        pixels, transform.do_rescale, transform.rescale_factor, transform.do_normalize, mean, std
    )
    return normalized


def _pad_views(views: Tensor, count: int) -> Tensor:  # [1, views, C, H, W] -> [1, count, C, H, W]
    return torch.cat([views, views.new_zeros(1, count - views.shape[1], *views.shape[2:])], 1)


def _by_shape(shapes: Sequence[Pair]) -> dict[Pair, list[int]]:
    """The indices of the pictures of each shape."""
    indices: dict[Pair, list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        indices[shape].append(index)
    return indices


def _normalization(spec: TowerSpec) -> dict[str, Any]:
    return {
        "resample": INTERPOLATIONS[spec.interpolation],
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


LAYOUTS: dict[str, type[Layout]] = {layout.kind: layout for layout in (Layout, Tiles, Native)}


def build_layout(num_view_tokens: int, values: Mapping[str, Any] | None) -> Layout:
    """The layout of a checkpoint: `values` come from `Layout.to_json`."""
    if values is None:
        return Layout(num_view_tokens)
    options = {name: value for name, value in values.items() if name != "kind"}
    if "grids" in options:
        options["grids"] = tuple((rows, columns) for rows, columns in options["grids"])
    return LAYOUTS[values["kind"]](num_view_tokens, **options)


def new_layout(config: VisionConfig, tower: VisionTower, projector: Projector, num_view_tokens: int) -> Layout:
    """The layout of a run's settings. Raises ConfigError where the tower or projector does not support it."""
    if config.image_mode not in ("anyres", "native"):
        return Layout(num_view_tokens)
    side, stride = tower.spec.image_size_px, projector.token_stride
    if stride is None:
        raise ConfigError(
            f"model.vision.image_mode: {config.image_mode} needs a projector whose tokens keep the grid of "
            "patches, which this one does not; take mlp, linear, downsample, or c_abstractor without num_tokens"
        )
    if config.image_mode == "anyres":
        return Tiles(num_view_tokens, side, config.tile_grids or NEXT_GRIDS)
    patches = math.isqrt(tower.num_patches)
    layout = Native(num_view_tokens, side // patches, stride, config.max_image_tokens or num_view_tokens)
    _try_native(layout, tower)
    return layout


@torch.no_grad()
def _try_native(layout: Native, tower: VisionTower) -> None:
    """Runs the tower on a picture that is not square. Raises ConfigError where it cannot take one."""
    parameter = next(tower.parameters(), torch.zeros(()))
    rows, columns = 2, 3
    height, width = rows * layout.unit_px, columns * layout.unit_px
    try:
        patches = tower(torch.zeros(1, 3, height, width, dtype=parameter.dtype, device=parameter.device))
        result: object = patches.shape[1]
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        result = str(error).splitlines()[0]
    if result != (num_patches := rows * columns * layout.token_stride**2):
        raise ConfigError(
            f"model.vision.image_mode: native needs a tower that takes pictures of any shape, and {tower.spec.source} "
            f"does not: for {height} x {width} pixels it gives {result} instead of {num_patches} patches; "
            "take image_mode: anyres"
        )
