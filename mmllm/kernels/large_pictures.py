"""Large pictures: shrunk first, then cropped and padded, so that memory is that of the result.

transformers' image processors pad to a square first: a screenshot of 900 x 16000 becomes 16000 x 16000. Resizing works
on one axis after the other, so the result here is the same up to rounding: nearly all values are equal, and the others
differ by 1 of 255, or by a few where a hard edge overshoots. Pictures of ordinary size go through transformers, bit
for bit.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

MAX_ORDINARY_PIXELS = 1 << 24  # 50 MB as RGB: a photo of 12 megapixels, padded to a square, is still ordinary
# A side that shrinks by more than twice this is box-averaged first: Pillow's filter needs memory for each tap.
REDUCING_GAP = 64.0
EDGE = 4  # pixels of the result around a padded picture that its edge may still color; Lanczos reaches 3


def resize(
    picture: Image.Image, size: tuple[int, int], resample: int, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """The picture, or its part in `box`, resized to this (width, height)."""
    return picture.resize(size, Image.Resampling(resample), box, REDUCING_GAP)


def pad_and_resize(picture: Image.Image, size: tuple[int, int], resample: int, color: tuple[int, ...]) -> Image.Image:
    """The same as padding to a square, then resizing to this (width, height)."""
    width, height = picture.size
    if width < height:
        transpose = Image.Transpose.TRANSPOSE
        # resize the long side first, so that a small picture is transposed
        short = resize(picture, (width, size[1]), resample).transpose(transpose)
        return _pad_columns(short, height, (size[1], size[0]), resample, color).transpose(transpose)
    return _pad_columns(resize(picture, (size[0], height), resample), width, size, resample, color)


def _pad_columns(
    strip: Image.Image, side: int, size: tuple[int, int], resample: int, color: tuple[int, ...]
) -> Image.Image:
    """Pads a strip of final width to `side` rows, then resizes it to the height of `size`.

    Padding rows are created only near the strip, where they affect the same rows of the result as the strip.
    """
    width, height = size
    scale = side / height
    top = (side - strip.height) // 2
    first = max(0, math.floor(top / scale) - EDGE)
    last = min(height, math.ceil((top + strip.height) / scale) + EDGE)
    begin = max(0, math.floor((first - EDGE) * scale))
    end = min(side, math.ceil((last + EDGE) * scale))
    canvas = Image.new("RGB", (width, end - begin), color)
    canvas.paste(strip, (0, top - begin))
    resized = resize(canvas, (width, last - first), resample, (0, first * scale - begin, width, last * scale - begin))
    result = Image.new("RGB", size, color)
    result.paste(resized, (0, first))
    return result


def crop_center(picture: Image.Image, shortest_px: int, size: tuple[int, int], resample: int) -> Image.Image:
    """The same as resizing the shorter side to `shortest_px`, then cropping (width, height) from the center."""
    scale = min(picture.size) / shortest_px
    whole = [shortest_px if side == min(picture.size) else int(side / scale) for side in picture.size]
    starts = [int((full - cropped) / 2) for full, cropped in zip(whole, size, strict=True)]
    steps = [side / full for side, full in zip(picture.size, whole, strict=True)]
    box = [start * step for start, step in zip(starts, steps, strict=True)]
    box += [(start + cropped) * step for start, cropped, step in zip(starts, size, steps, strict=True)]
    return resize(picture, size, resample, (box[0], box[1], box[2], box[3]))


def fit_inside(picture: Image.Image, inner: tuple[int, int], outer: tuple[int, int], resample: int) -> Image.Image:
    """The picture resized to the (width, height) `inner`, centered on black of the size `outer`."""
    canvas = Image.new("RGB", outer)
    canvas.paste(resize(picture, inner, resample), ((outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2))
    return canvas


def fit_as(transform: Any, picture: Image.Image) -> Image.Image:
    """The picture as this LlavaImageProcessor crops, pads and stretches it, before it is normalised."""
    resample = transform.resample
    if transform.do_center_crop:
        size = (transform.crop_size["width"], transform.crop_size["height"])
        return crop_center(picture, transform.size["shortest_edge"], size, resample)
    size = (transform.size["width"], transform.size["height"])
    if transform.do_pad:
        return pad_and_resize(picture, size, resample, tuple(int(value * 255) for value in transform.image_mean))
    return resize(picture, size, resample)


def num_pixels_as(transform: Any, size: tuple[int, int]) -> int:
    """The most pixels that this LlavaImageProcessor holds at once for a picture of this (height, width)."""
    short, long = min(size), max(size)
    if transform.do_center_crop:
        resized_short = int(transform.size["shortest_edge"])
        return max(short * long, resized_short**2 * long // short)
    return long**2 if transform.do_pad else short * long
