"""The picture as the vision tower receives it, for people to look at."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmllm.batch import PreparedImage
from mmllm.kernels.large_pictures import resize
from mmllm.model.image_tokens import Layout, Native, Tiles

GAP_PX = 4  # white space between the views of one picture


def preview(layout: Layout, transform: Any, image: PreparedImage) -> Image.Image:
    """The pixels that the tower receives, with the normalisation of `transform`, its image processor, undone.

    Of a tiled picture, the downscaled whole is on the left and the grid of tiles on the right.
    """
    inputs = image.inputs
    pixels = inputs["pixel_values"][0]
    if isinstance(layout, Tiles):
        views = [_to_image(view, transform) for view in pixels]
        return _mosaic(views, *layout.grid(image.size))
    if isinstance(layout, Native):
        pixels = layout.as_pixels(inputs["pixel_values"], tuple(inputs["image_sizes"][0].tolist()))[0]
    return _to_image(pixels, transform)


def shrink(picture: Image.Image, longest_px: int) -> Image.Image:
    """The picture, made smaller where a side is longer than `longest_px`."""
    scale = longest_px / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return resize(picture, (width, height), Image.Resampling.BICUBIC)


def _to_image(pixels: Tensor, transform: Any) -> Image.Image:  # [C, H, W]
    values: NDArray[np.float32] = pixels.float().numpy().transpose(1, 2, 0)
    values = values * np.array(transform.image_std) + np.array(transform.image_mean)
    return Image.fromarray(np.clip(values * 255 + 0.5, 0, 255).astype(np.uint8))


def _mosaic(views: list[Image.Image], rows: int, columns: int) -> Image.Image:
    side = views[0].width
    step = side + GAP_PX
    canvas = Image.new("RGB", ((columns + 1) * step - GAP_PX, max(1, rows) * step - GAP_PX), "white")
    canvas.paste(views[0], (0, (canvas.height - side) // 2))
    for number, view in enumerate(views[1:]):
        row, column = divmod(number, columns)
        canvas.paste(view, ((column + 1) * step, row * step))
    return canvas
