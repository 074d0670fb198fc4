"""The image transform: every way of making a picture square, in the tower's own size and numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmllm.model.image_tokens import Layout
from mmllm.model.tower import TowerSpec

SIDE = 16
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
SPEC = TowerSpec({}, -1, SIDE, MEAN, STD, "bicubic", "a test")
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def bands(*colors: tuple[int, int, int]) -> Image.Image:
    """A wide picture, three times as wide as high: three squares of colour side by side."""
    picture = Image.new("RGB", (96, 32))
    for number, color in enumerate(colors):
        picture.paste(color, (32 * number, 0, 32 * number + 32, 32))
    return picture


def seen(fit: str, picture: Image.Image) -> Tensor:
    pixels: Tensor = Layout(1).image_processor(SPEC, fit)([picture], return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, SIDE, SIDE)
    assert pixels.dtype == torch.float32
    return pixels


def color_at(pixels: Tensor, row: int, column: int) -> list[int]:
    values = pixels[:, row, column] * torch.tensor(STD) + torch.tensor(MEAN)
    return (values * 255).round().int().tolist()


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_pixels_are_normalised_with_the_towers_own_numbers(fit: str) -> None:
    pixels = seen(fit, Image.new("RGB", (40, 40), (255, 128, 0)))
    expected = [(value / 255 - mean) / std for value, mean, std in zip((255, 128, 0), MEAN, STD, strict=True)]
    torch.testing.assert_close(pixels[:, 5, 5], torch.tensor(expected))


def test_stretch_shows_the_whole_picture_without_a_border() -> None:
    pixels = seen("stretch", bands(RED, GREEN, BLUE))
    assert [color_at(pixels, row, column) for row in (0, 15) for column in (1, 8, 14)] == [
        list(color) for color in (RED, GREEN, BLUE) * 2
    ]


def test_pad_keeps_the_shape_between_borders_of_the_mean() -> None:
    pixels = seen("pad", bands(RED, GREEN, BLUE))
    assert [color_at(pixels, 8, column) for column in (1, 8, 14)] == [list(RED), list(GREEN), list(BLUE)]
    mean = [round(value * 255) for value in MEAN]
    assert np.abs(np.array(color_at(pixels, 0, 8)) - mean).max() <= 1
    assert np.abs(np.array(color_at(pixels, 15, 8)) - mean).max() <= 1


def test_square_takes_the_middle() -> None:
    pixels = seen("crop", bands(RED, GREEN, BLUE))
    assert [color_at(pixels, row, column) for row in (0, 15) for column in (1, 8, 14)] == [list(GREEN)] * 6


def test_a_transform_is_kept_in_its_own_file_and_read_again(tmp_path) -> None:
    from transformers import LlavaImageProcessor

    processor = Layout(1).image_processor(SPEC, "pad")
    processor.save_pretrained(tmp_path)
    again = LlavaImageProcessor.from_pretrained(tmp_path)
    picture = bands(RED, GREEN, BLUE)
    assert torch.equal(again([picture], return_tensors="pt")["pixel_values"][0], seen("pad", picture))
