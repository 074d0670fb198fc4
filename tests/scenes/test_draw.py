"""What is drawn is what the scene says, by either renderer: place, size, color, height of bars."""

from __future__ import annotations

import colorsys
import itertools
import random

import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv
from numpy.typing import NDArray
from PIL import Image

from mmllm.scenes.draw import SHADES, draw, outline, shade
from mmllm.scenes.world import COLORS, PLACES, SHAPES, SIZES, WORDS, Bar, Line, Scene, Thing, sample_any_scene
from tests.builders import other_renderer

RENDERERS = pytest.mark.parametrize("paint", [draw, other_renderer.draw], ids=["pillow", "distances"])
CENTERS = np.array([0.24, 0.5, 0.76])


def one(shape: str = "circle", color: str = "blue", size: str = "large", place: str = "center") -> Scene:
    return Scene("objects", things=(Thing(shape, color, size, place),))


def pixels(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture, float) / 255


def far_from_paper(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where something is drawn: not near the commonest color, which is the background."""
    flat = values.reshape(-1, 3)
    _, first, counts = np.unique(np.rint(flat * 255) @ (1, 256, 65536), return_index=True, return_counts=True)
    return np.linalg.norm(values - flat[first[counts.argmax()]], axis=-1) > 0.25


def hues(values: NDArray[np.float64], color: str) -> NDArray[np.float64]:
    """Hues in degrees, those of red around 0."""
    found = 360 * rgb_to_hsv(values)[..., 0]
    return (found + 180) % 360 - 180 if color == "red" else found


def is_of(values: NDArray[np.float64], color: str) -> NDArray[np.bool_]:
    """Which of these RGB values people would call by this name."""
    _, saturation, value = np.moveaxis(rgb_to_hsv(values), -1, 0)
    if color == "black":
        return value < 0.2
    (low, high), hue = SHADES[color][0], hues(values, color)
    return (low - 4 <= hue) & (hue <= high + 4) & (saturation > 0.38) & (value > 0.2)


def assert_color(picture: Image.Image, color: str) -> None:
    """What is drawn most clearly has the hue of its name; edges in black are left out."""
    values = pixels(picture)
    drawn = values[far_from_paper(values)]
    value = drawn.max(axis=-1)
    if color == "black":
        assert np.percentile(value, 5) < 0.35
        return
    drawn = drawn[value > 0.3]
    saturation = rgb_to_hsv(drawn)[:, 1]
    hue = np.median(hues(drawn[saturation >= np.percentile(saturation, 75)], color))
    low, high = SHADES[color][0]
    assert low - 5 <= hue <= high + 5


@pytest.mark.parametrize("color", COLORS)
def test_a_shade_is_within_its_name_and_names_do_not_overlap(color):
    rng = random.Random(color)
    for _ in range(200):
        hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in shade(color, rng)))
        (low, high), (least, _), (dark, light) = SHADES[color]
        if color == "black":
            assert value <= light + 0.01
            continue
        assert low - 2 <= (360 * hue + 180) % 360 - 180 <= high + 2 or low - 2 <= 360 * hue <= high + 2
        assert saturation >= least - 0.02
        assert dark - 0.01 <= value <= light + 0.01
    spans = sorted(SHADES[name][0] for name in COLORS if name != "black")
    assert all(before[1] + 8 < after[0] for before, after in itertools.pairwise(spans))


@RENDERERS
@pytest.mark.parametrize("color", COLORS)
def test_everything_has_the_color_of_its_name(paint, color):
    for seed in range(6):
        rng = random.Random(seed)
        assert_color(paint(one(rng.choice(SHAPES), color, rng.choice(SIZES), rng.choice(list(PLACES))), rng), color)
        assert_color(paint(Scene("text", lines=(Line("word", rng.choice(WORDS), color),)), rng), color)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_filled_thing_has_its_color_at_its_center(color, shape):
    """At the place's middle lies the thing, wherever it was moved to; one in seven is hollow there."""
    hits = 0
    for seed in range(12):
        values = pixels(draw(one(shape, color), random.Random(seed)))
        height, width, _ = values.shape
        hits += bool(is_of(values[height // 2, width // 2], color))
    assert hits >= 7


@RENDERERS
@pytest.mark.parametrize("place", PLACES)
def test_things_stand_in_their_place(paint, place):
    for seed, shape in enumerate(SHAPES * 2):
        drawn = far_from_paper(pixels(paint(one(shape, "purple", SIZES[seed % 2], place), random.Random(seed))))
        rows, columns = np.nonzero(drawn)
        height, width = drawn.shape
        column, row = (int(np.abs(CENTERS - at).argmin()) for at in (columns.mean() / width, rows.mean() / height))
        assert (column, row) == PLACES[place]


@RENDERERS
@pytest.mark.parametrize("shape", SHAPES)
def test_small_things_are_smaller_than_large_ones(paint, shape):
    """By the farthest point from the middle, in shorter sides of the picture: no rotation changes that."""
    reach: dict[str, list[float]] = {size: [] for size in SIZES}
    for seed in range(15):
        for size in SIZES:
            drawn = far_from_paper(pixels(paint(one(shape, "black", size), random.Random(seed))))
            points = np.argwhere(drawn)
            reach[size].append(float(np.linalg.norm(points - points.mean(axis=0), axis=1).max()) / min(drawn.shape))
    assert max(reach["small"]) < min(reach["large"])


@RENDERERS
def test_bars_are_as_tall_as_their_values(paint):
    rng = random.Random(0)
    colors = [color for color in COLORS if color != "black"]
    for _ in range(12):
        bars = tuple(Bar(color, rng.randint(1, 5)) for color in rng.sample(colors, rng.randint(2, 4)))
        values = pixels(paint(Scene("chart", bars=bars), rng))
        heights = []
        for bar in bars:
            mask = is_of(values, bar.color)
            num_per_row = mask.sum(axis=1)
            heights.append(int((num_per_row > num_per_row.max() / 2).sum()))
        tallest = max(range(len(bars)), key=lambda index: bars[index].value)
        step = heights[tallest] / bars[tallest].value
        assert [round(height / step) for height in heights] == [bar.value for bar in bars]


@RENDERERS
def test_all_scenes_can_be_drawn_and_one_seed_gives_one_picture(paint):
    rng = random.Random(0)
    for seed in range(12):
        scene = sample_any_scene(rng, ("objects", "text", "chart")[seed % 3])
        picture, again, other = (paint(scene, random.Random(number)) for number in (seed, seed, seed + 1))
        assert picture.mode == "RGB"
        assert 64 <= min(picture.size) <= max(picture.size) <= 256
        assert far_from_paper(pixels(picture)).any()
        assert (picture.size, picture.tobytes()) == (again.size, again.tobytes())
        assert picture.tobytes() != other.tobytes()


def test_pictures_vary_in_size_and_tint():
    pictures = [draw(one(), random.Random(seed)) for seed in range(40)]
    assert len({picture.size for picture in pictures}) > 6
    assert len({picture.getpixel((0, 0)) for picture in pictures}) > 30


@pytest.mark.parametrize("word", WORDS)
def test_words_are_drawn_within_the_picture(word):
    for seed in range(3):
        drawn = far_from_paper(pixels(draw(Scene("text", lines=(Line("word", word, "black"),)), random.Random(seed))))
        assert drawn.mean() > 0.01
        assert not drawn[:, 0].any()
        assert not drawn[:, -1].any()


def test_the_other_renderer_has_a_glyph_for_every_word_and_number():
    assert {letter for word in WORDS for letter in word} | set("0123456789") == set(other_renderer.GLYPHS)


def test_an_unknown_shape_is_said():
    with pytest.raises(ValueError, match="no drawing for the shape 'moon'"):
        outline("moon", random.Random(0))
