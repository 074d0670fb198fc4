"""Draws scenes with other code than `mmllm.scenes.draw`: signed distances in NumPy instead of Pillow's brush.

Other sizes, tints, colors, line widths, letters and charts, so that a model which answers about these pictures has
learnt pictures and not one program's pixels. Distance functions: https://iquilezles.org/articles/distfunctions2d/
Lengths are in pixels, y goes down; `x` and `y` are arrays [H, W] around the shape's center unless said otherwise.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmllm.scenes.world import MAX_VALUE, Bar, Kind, Line, Scene, Thing

Array = NDArray[np.float64]
RGB = tuple[int, int, int]

# fmt: off
COLORS: dict[str, RGB] = {
    "red": (220, 20, 20), "orange": (255, 140, 0), "yellow": (240, 220, 0), "green": (0, 150, 0),
    "blue": (20, 60, 220), "purple": (128, 0, 160), "black": (0, 0, 0),
}
PAPERS: tuple[RGB, ...] = ((255, 255, 255), (245, 245, 220), (240, 248, 255), (230, 230, 250), (211, 211, 211),
                           (240, 255, 240), (255, 240, 245))
PICTURE_SIZES = ((100, 100), (120, 120), (144, 144), (160, 160), (200, 200), (256, 256), (160, 120), (120, 160),
                 (256, 192))  # (width, height)
# fmt: on
RADIUS = {"small": (0.075, 0.1), "large": (0.155, 0.18)}  # of the shorter side
CENTERS = (0.25, 0.5, 0.75)

# Strokes of the letters and digits: corners "xy" on a grid 4 wide and 6 high, from the top left.
GLYPHS = {
    "a": "06-20-46 14-34",
    "b": "00-06-36-45-44-33-03 33-42-41-30-00",
    "c": "41-30-10-01-05-16-36-45",
    "d": "00-06-26-44-42-20-00",
    "e": "40-00-06-46 03-33",
    "f": "40-00-06 03-33",
    "g": "41-30-10-01-05-16-36-45-43-23",
    "h": "00-06 40-46 03-43",
    "i": "20-26 10-30 16-36",
    "k": "00-06 40-03-46",
    "l": "00-06-46",
    "m": "06-00-23-40-46",
    "n": "06-00-46-40",
    "o": "10-01-05-16-36-45-41-30-10",
    "p": "06-00-30-41-42-33-03",
    "r": "06-00-30-41-42-33-03 23-46",
    "s": "41-30-10-01-02-13-33-44-45-36-16-05",
    "t": "00-40 20-26",
    "u": "00-05-16-36-45-40",
    "w": "00-16-22-36-40",
    "y": "00-23-40 23-26",
    "0": "10-01-05-16-36-45-41-30-10",
    "1": "11-20-26 16-36",
    "2": "01-10-30-41-42-06-46",
    "3": "01-10-30-41-42-33-13 33-44-45-36-16-05",
    "4": "36-30-04-44",
    "5": "40-00-03-33-44-45-36-16-05",
    "6": "41-30-10-01-05-16-36-45-44-33-13-04",
    "7": "00-40-16",
    "8": "13-02-01-10-30-41-42-33-13-04-05-16-36-45-44-33",
    "9": "42-33-13-02-01-10-30-41-45-36-16-05",
}


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    away_x, away_y = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(away_x, 0), np.maximum(away_y, 0)) + np.minimum(np.maximum(away_x, away_y), 0)


def _circle(x: Array, y: Array, radius: float) -> Array:
    return np.hypot(x, y) - radius


def _square(x: Array, y: Array, radius: float) -> Array:
    return _box(x, y, 0.86 * radius, 0.86 * radius)


def _triangle(x: Array, y: Array, radius: float) -> Array:
    """The largest of the distances to three lines: exact inside, a little small beyond the corners."""
    side = np.abs(x) * math.cos(math.pi / 6) - y * math.sin(math.pi / 6)
    return np.maximum(side, y) - 0.58 * radius


def _star(x: Array, y: Array, radius: float) -> Array:
    """Five wedges folded into one: the distance to the line from a tip to the notch beside it."""
    wedge = 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + wedge / 2) % wedge - wedge / 2)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    tip, notch = 1.1 * radius, 0.44 * radius
    edge_x, edge_y = notch * math.cos(wedge / 2) - tip, notch * math.sin(wedge / 2)
    return ((tip - along) * -edge_y + across * -edge_x) / math.hypot(edge_x, edge_y)


def _cross(x: Array, y: Array, radius: float) -> Array:
    return np.minimum(_box(x, y, radius, 0.3 * radius), _box(x, y, 0.3 * radius, radius))


def _heart(x: Array, y: Array, radius: float) -> Array:
    """Two half circles on a square that stands on its corner."""
    scale = 1.75 * radius
    u, v = np.abs(x) / scale, 0.55 - y / scale
    lobe = np.hypot(u - 0.25, v - 0.75) - math.sqrt(2) / 4
    foot = np.maximum(u + v, 0) / 2
    body = np.sqrt(np.minimum(u**2 + (v - 1) ** 2, (u - foot) ** 2 + (v - foot) ** 2)) * np.sign(u - v)
    return np.where(u + v > 1, lobe, body) * scale


SHAPES: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}


class _Page:
    """The picture as floats, and the coordinates of each pixel's middle."""

    def __init__(self, width: int, height: int, paper: RGB):
        self.width, self.height = width, height
        self.side = min(width, height)
        self.values: Array = np.tile(np.array(paper, float), (height, width, 1))
        self.y, self.x = (grid + 0.5 for grid in np.mgrid[0:height, 0:width].astype(float))

    def fill(self, distance: Array, color: RGB) -> None:
        """Colors all that is inside; a pixel on the border takes the share of it that is covered."""
        covered = np.clip(0.5 - distance, 0, 1)[..., None]
        self.values += covered * (np.array(color, float) - self.values)


def _draw_thing(page: _Page, thing: Thing, rng: random.Random) -> None:
    x = (CENTERS[thing.column] + rng.uniform(-0.035, 0.035)) * page.width
    y = (CENTERS[thing.row] + rng.uniform(-0.035, 0.035)) * page.height
    radius = rng.uniform(*RADIUS[thing.size]) * page.side
    turn = math.radians(rng.uniform(-10, 10))
    right, down = page.x - x, page.y - y
    u = right * math.cos(turn) + down * math.sin(turn)
    v = down * math.cos(turn) - right * math.sin(turn)
    distance = SHAPES[thing.shape](u, v, radius)
    color = COLORS[thing.color]
    style = rng.random()
    if style < 0.1:
        width = radius * rng.uniform(0.16, 0.24)
        page.fill(np.abs(distance + width / 2) - width / 2, color)
        return
    page.fill(distance, color)
    if style < 0.3:
        width = max(1.0, page.side * rng.uniform(0.01, 0.02))
        page.fill(np.abs(distance) - width / 2, (40, 40, 40))


def _strokes(text: str) -> list[tuple[Array, Array]]:
    """Both ends of every stroke of a line of text, in glyph units: 4 wide, 6 high, 1.9 apart."""
    ends = []
    for index, letter in enumerate(text):
        for stroke in GLYPHS[letter].split():
            corners = [np.array((int(x) + 5.9 * index, int(y)), float) for x, y in stroke.split("-")]
            ends += list(itertools.pairwise(corners))
    return ends


def _draw_line(page: _Page, line: Line, y: float, rng: random.Random) -> None:
    strokes = _strokes(line.text)
    across = 5.9 * len(line.text) - 1.9
    unit = min(page.side * rng.uniform(0.22, 0.3) / 6, 0.86 * page.width / (1.0 * across + 1))
    thickness = unit * rng.uniform(0.8, 1.2)
    left = (page.width - across * unit) * rng.uniform(0.35, 0.65)
    top = y * page.height - 3 * unit
    slant = rng.uniform(-0.08, 0.15)
    v = (page.y - top) / unit
    u = (page.x - left) / unit + slant * (v - 3)
    nearest = np.full_like(u, np.inf)
    for begin, end in strokes:
        step = end - begin
        along = np.clip(((u - begin[0]) * step[0] + (v - begin[1]) * step[1]) / (step @ step), 0, 1)
        nearest = np.minimum(nearest, np.hypot(u - begin[0] - along * step[0], v - begin[1] - along * step[1]))
    page.fill(nearest * unit - thickness / 2, COLORS[line.color])


def _draw_chart(page: _Page, bars: tuple[Bar, ...], rng: random.Random) -> None:
    left, right = 0.15 * page.width, 0.94 * page.width
    top, bottom = rng.uniform(0.08, 0.14) * page.height, rng.uniform(0.86, 0.92) * page.height
    step = (bottom - top) / MAX_VALUE
    width = max(1.0, 0.012 * page.side)
    ink = (70, 70, 70)
    for value in range(1, MAX_VALUE + 1):
        tick = _box(page.x - left, page.y - (bottom - value * step), 0.03 * page.side, width / 2)
        page.fill(tick, ink)
    slot = (right - left) / len(bars)
    half = slot * rng.uniform(0.28, 0.38)
    for index, bar in enumerate(bars):
        x, height = left + slot * (index + 0.5), bar.value * step
        page.fill(_box(page.x - x, page.y - (bottom - height / 2), half, height / 2), COLORS[bar.color])
    page.fill(_box(page.x - left, page.y - (top + bottom) / 2, width / 2, (bottom - top) / 2), ink)
    page.fill(_box(page.x - (left + right) / 2, page.y - bottom, (right - left) / 2, width / 2), ink)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """One RGB picture of the scene, 100-256 pixels a side."""
    page = _Page(*rng.choice(PICTURE_SIZES), rng.choice(PAPERS))
    if scene.bars:
        _draw_chart(page, scene.bars, rng)
    for thing in scene.things:
        _draw_thing(page, thing, rng)
    for index, line in enumerate(scene.lines):
        _draw_line(page, line, 0.5 if len(scene.lines) == 1 else (0.28, 0.72)[index], rng)
    return Image.fromarray(np.rint(page.values).astype(np.uint8))


def redraw(
    split: Path, paint: Callable[[Scene, random.Random], Image.Image] = draw, kinds: Sequence[Kind] = get_args(Kind)
) -> None:
    """Draws the pictures of these kinds of a written split anew, from the scene graphs beside them."""
    for graph in sorted((split / "images").glob("*.json")):
        scene = Scene.from_json(json.loads(graph.read_text()))
        if scene.kind in kinds:
            paint(scene, random.Random(graph.stem)).save(graph.with_suffix(".png"))
