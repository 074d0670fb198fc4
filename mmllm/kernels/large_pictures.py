"""Large pictures: made small first, cropped and padded then, so that memory is that of the result.

transformers' image processors pad to a square first: a screenshot of 900 x 16000 becomes 16000 x 16000. Resizing works
along one axis after the other, so the result here is the same but for rounding: nearly all values are equal, and those
that are not differ by one of 255, or by a few where a hard edge overshoots. Pictures of ordinary size take the way of
transformers, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

MAX_ORDINARY_PIXELS = 1 << 24  # 50 MB as RGB: a photo of 12 megapixels, padded to a square, is still ordinary
# A side that shrinks by more than twice this is averaged over whole pixels first: Pillow's filter takes memory a tap.
REDUCING_GAP = 64.0
EDGE = 4  # pixels of the result on either side of a padded picture that its edge may still colour; Lanczos reaches 3


def resize(
    picture: Image.Image, size: tuple[int, int], resample: int, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """The picture, or what is in `box` of it, at this (width, height)."""
    return picture.resize(size, Image.Resampling(resample), box, REDUCING_GAP)


def pad_and_resize(picture: Image.Image, size: tuple[int, int], resample: int, color: tuple[int, ...]) -> Image.Image:
    """What padding to a square, then resizing to this (width, height), would give."""
    width, height = picture.size
    if width < height:
        turned = Image.Transpose.TRANSPOSE
        # the long side first: what is turned then is small
        short = resize(picture, (width, size[1]), resample).transpose(turned)
        return _pad_columns(short, height, (size[1], size[0]), resample, color).transpose(turned)
    return _pad_columns(resize(picture, (size[0], height), resample), width, size, resample, color)


def _pad_columns(
    strip: Image.Image, side: int, size: tuple[int, int], resample: int, color: tuple[int, ...]
) -> Image.Image:
    """A strip that has its width already, padded to `side` rows, resized to the height of `size`.

    Only those rows of the padding are made that can be seen in rows of the result which see the strip too.
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
    seen = resize(canvas, (width, last - first), resample, (0, first * scale - begin, width, last * scale - begin))
    result = Image.new("RGB", size, color)
    result.paste(seen, (0, first))
    return result


def crop_center(picture: Image.Image, shortest_px: int, size: tuple[int, int], resample: int) -> Image.Image:
    """What bringing the shorter side to `shortest_px`, then cutting (width, height) out of the middle, would give."""
    scale = min(picture.size) / shortest_px
    whole = [shortest_px if side == min(picture.size) else int(side / scale) for side in picture.size]
    starts = [int((have - want) / 2) for have, want in zip(whole, size, strict=True)]
    steps = [side / have for side, have in zip(picture.size, whole, strict=True)]
    box = [start * step for start, step in zip(starts, steps, strict=True)]
    box += [(start + want) * step for start, want, step in zip(starts, size, steps, strict=True)]
    return resize(picture, size, resample, (box[0], box[1], box[2], box[3]))


def fit_inside(picture: Image.Image, inner: tuple[int, int], outer: tuple[int, int], resample: int) -> Image.Image:
    """The picture at the (width, height) `inner`, in the middle of a black one of `outer`."""
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
    """The most pixels that this LlavaImageProcessor holds of a picture of this (height, width)."""
    short, long = min(size), max(size)
    if transform.do_center_crop:
        resized_short = int(transform.size["shortest_edge"])
        return max(short * long, resized_short**2 * long // short)
    return long**2 if transform.do_pad else short * long
