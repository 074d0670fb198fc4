"""The picture as the vision tower sees it, for people to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmllm.data.images import load_image
from mmllm.model.layout import Layout, Native, Tiles

GAP_PX = 4  # white, between the views of one picture


def as_seen(layout: Layout, transform: Any, image: str | Path | bytes | Image.Image) -> Image.Image:
    """What a tower with this image processor gets, values back in 0-255. Raises ImageError.

    Of tiles, the whole picture stands on the left and the grid of tiles beside it.
    """
    picture = load_image(image)
    inputs = layout.inputs(transform([picture], return_tensors="pt"))
    pixels = inputs["pixel_values"][0]
    if isinstance(layout, Tiles):
        views = [_to_image(view, transform) for view in pixels]
        return _mosaic(views, *layout.grid((picture.height, picture.width)))
    if isinstance(layout, Native):
        pixels = layout.as_pixels(inputs["pixel_values"], tuple(inputs["image_sizes"][0].tolist()))[0]
    return _to_image(pixels, transform)


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
