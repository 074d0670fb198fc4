"""Large pictures are made small first: what the tower sees stays the same, and memory is that of the result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw

from mmllm.batch import PreparedImage
from mmllm.images import load_image
from mmllm.kernels.large_pictures import MAX_ORDINARY_PIXELS
from mmllm.model.image_tokens import NEXT_GRIDS, Layout, Native, Tiles
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.tower import TowerSpec

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.26, 0.27)
SIDE_PX = 84
LAYOUTS = {
    "pad": Layout(36),
    "crop": Layout(36),
    "stretch": Layout(36),
    "anyres": Tiles(36, SIDE_PX, NEXT_GRIDS),
    "native": Native(36, 14, 1, 36),
}
# Sizes of ordinary pictures, wide, tall, square, thin, and smaller than the tower's.
SIZES = [(800, 60), (37, 700), (301, 300), (640, 480), (50, 20), (1, 400), (501, 3)]


def a_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft noise with hard edges, as photos and screenshots have."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(values)
    ImageDraw.Draw(picture).rectangle((0, 0, width // 3, height // 3), "black")
    return picture


def transform_of(fit: str, interpolation: str = "bicubic") -> Any:
    spec = TowerSpec({}, -1, SIDE_PX, MEAN, STD, interpolation, "a test")
    return LAYOUTS[fit].image_processor(spec, fit)


def levels(pixels: torch.Tensor) -> NDArray[np.float32]:
    """Normalised pixels [..., C, H, W] as levels of 0-255."""
    shape = (3, 1, 1)
    levels: NDArray[np.float32] = (
        ((pixels.float() * torch.tensor(STD).view(shape)) + torch.tensor(MEAN).view(shape)) * 255
    ).numpy()
    return levels


def native_pixels(layout: Native, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    rows, columns = inputs["image_sizes"][0].tolist()
    return layout.as_pixels(inputs["pixel_values"], (rows, columns))


def levels_of(prepared: PreparedImage, layout: Layout) -> NDArray[np.float32]:
    inputs = dict(prepared.inputs)
    return levels(native_pixels(layout, inputs) if isinstance(layout, Native) else inputs["pixel_values"])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("fit", LAYOUTS)
def test_a_picture_made_small_first_is_seen_as_transformers_shows_it(fit: str, interpolation: str) -> None:
    layout, transform = LAYOUTS[fit], transform_of(fit, interpolation)
    for width, height in SIZES:
        picture = a_picture(width, height)
        usual = layout.inputs(transform([picture], return_tensors="pt"))
        small = layout.inputs(layout.prepare_large(transform, picture, (height, width)))
        assert {name: value.shape for name, value in small.items()} == {n: v.shape for n, v in usual.items()}
        if "image_sizes" in usual:
            assert torch.equal(usual["image_sizes"], small["image_sizes"])
        difference = np.abs(
            levels_of(PreparedImage((height, width), usual), layout)
            - levels_of(PreparedImage((height, width), small), layout)
        )
        assert difference.max() < 8, (width, height)
        assert difference.mean() < 0.05, (width, height)


def processor_of(fit: str) -> VisionLanguageProcessor:
    """A processor for pictures alone."""
    processor = VisionLanguageProcessor.__new__(VisionLanguageProcessor)
    processor.num_image_tokens, processor.layout = 36, LAYOUTS[fit].to_json()
    processor.image_processor = transform_of(fit)
    return processor


@pytest.mark.parametrize("fit", LAYOUTS)
def test_ordinary_pictures_are_what_transformers_makes_of_them_however_they_are_grouped(
    fit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [
        a_picture(*size, seed=seed) for seed, size in enumerate([(40, 30), (30, 40), (40, 30), (200, 100), (9, 9)])
    ]
    processor = processor_of(fit)
    expected = LAYOUTS[fit].inputs(processor.image_processor(pictures, return_tensors="pt"))
    for most in (MAX_ORDINARY_PIXELS, 45_000, 40_000):  # all at once; in groups; the widest ones one by one
        monkeypatch.setattr("mmllm.model.processor.MAX_ORDINARY_PIXELS", most)
        found = processor.image_inputs(iter(pictures))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    prepared = [processor.prepare(picture) for picture in pictures]
    assert all(torch.equal(processor.image_inputs(prepared)[name], value) for name, value in expected.items())


def peak_mb() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) // 1024


def test_a_strip_needs_the_memory_of_its_own_pixels(tmp_path: Path) -> None:
    path, processors = tmp_path / "strip.png", {fit: processor_of(fit) for fit in LAYOUTS}
    strip = Image.new("RGB", (50_000, 400), "navy")  # padded to a square it would be 7.5 GB
    strip.save(path, compress_level=1)
    del strip
    for fit, processor in processors.items():
        processor.load_prepared(a_picture(40, 40))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = peak_mb()
        assert processor.load_prepared(str(path)).size == (400, 50_000)
        assert peak_mb() - before < 50_000 * 400 * 4 // 2**20 + 100, fit


def test_a_side_of_a_million_pixels_takes_no_memory_of_its_length_squared() -> None:
    for fit in ("pad", "crop", "stretch"):
        line = Image.new("RGB", (2_000_000, 2), "white")
        inputs = LAYOUTS[fit].prepare(transform_of(fit), line, (2, 2_000_000))
        assert inputs["pixel_values"].shape == (1, 3, SIDE_PX, SIDE_PX)


def test_a_large_photo_is_decoded_at_half_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmllm.images.MAX_WHOLE_PIXELS", 1 << 19)
    monkeypatch.setattr("mmllm.images.MIN_SHRUNK_SIDE_PX", 256)
    path, strip = tmp_path / "phone.jpg", tmp_path / "strip.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.linear_gradient("L").resize((1020, 765)).convert("RGB").save(path, quality=85, exif=exif)
    assert load_image(path, may_shrink=True).size == (383, 510)
    assert load_image(path, may_shrink=True, max_pixels=200_000).size == (383, 510)  # what is decoded counts
    assert load_image(path).size == (765, 1020)
    for fit in ("pad", "anyres", "native"):
        processor = processor_of(fit)
        prepared = processor.load_prepared(str(path))
        assert prepared.size == (1020, 765)
        exact = processor.prepare(load_image(path))
        assert prepared.inputs["pixel_values"].shape == exact.inputs["pixel_values"].shape
        difference = np.abs(levels_of(prepared, LAYOUTS[fit]) - levels_of(exact, LAYOUTS[fit]))
        assert difference.mean() < 0.5
    Image.new("L", (5000, 300)).save(strip)
    assert load_image(strip, may_shrink=True).size == (5000, 300)  # its short side would become too small
