"""Draws a scene with Pillow. No two pictures of one scene are alike.

Size, aspect ratio, tint, shade, place, rotation, line width, fill, font and anti-aliasing vary within bounds that keep
the scene's facts true, so a model must learn what is shown and not how. All lengths are fractions of the picture's
shorter side until `_Canvas` turns them into pixels.
"""

from __future__ import annotations

import colorsys
import functools
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmllm.scenes.world import MAX_VALUE, Bar, Line, Scene, Thing

RGB = tuple[int, int, int]
Point = tuple[float, float]

# (hue range in degrees, saturation range, value range) of what people call by this name
# fmt: off
SHADES: dict[str, tuple[Point, Point, Point]] = {
    "red":    ((-10, 6),   (0.75, 1.0), (0.70, 1.0)),
    "orange": ((24, 38),   (0.85, 1.0), (0.90, 1.0)),
    "yellow": ((50, 61),   (0.75, 1.0), (0.85, 1.0)),
    "green":  ((95, 150),  (0.60, 1.0), (0.45, 1.0)),
    "blue":   ((205, 242), (0.65, 1.0), (0.60, 1.0)),
    "purple": ((268, 302), (0.45, 1.0), (0.45, 0.9)),
    "black":  ((0, 360),   (0.00, 0.5), (0.00, 0.17)),
}
# fmt: on
SIZES_PX = (64, 80, 96, 128)
RADIUS = {"small": (0.065, 0.105), "large": (0.145, 0.19)}
CENTERS = (0.23, 0.5, 0.77)
PLACE_JITTER = 0.045


def _uniform(rng: random.Random, bounds: Point) -> float:
    return rng.uniform(*bounds)


def shade(color: str, rng: random.Random) -> RGB:
    hue, saturation, value = (_uniform(rng, bounds) for bounds in SHADES[color])
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _darker(color: RGB, factor: float = 0.55) -> RGB:
    return tuple(round(channel * factor) for channel in color)  # type: ignore[return-value]


class _Canvas:
    """A picture while it is drawn: `scale` times too large, and reduced at the end."""

    def __init__(self, rng: random.Random):
        side = rng.choice(SIZES_PX)
        self.width = self.height = side
        if rng.random() < 0.2:
            stretched = round(side * rng.uniform(1.1, 1.35))
            self.width, self.height = rng.choice(((stretched, side), (side, stretched)))
        self.scale = 1 if rng.random() < 0.1 else 3
        tint = rng.uniform(200, 255)
        self.background: RGB = tuple(  # type: ignore[assignment]
            min(255, max(190, round(tint + rng.uniform(-18, 18)))) for _ in range(3)
        )
        self.image = Image.new("RGB", (self.width * self.scale, self.height * self.scale), self.background)
        self.brush = ImageDraw.Draw(self.image)

    def at(self, x: float, y: float) -> Point:
        """The pixel at these fractions of width and height."""
        return x * self.width * self.scale, y * self.height * self.scale

    def length(self, fraction: float) -> float:
        return fraction * min(self.width, self.height) * self.scale

    def finish(self, rng: random.Random) -> Image.Image:
        if self.scale == 1:
            return self.image
        filters = (Image.Resampling.BOX, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR)
        return self.image.resize((self.width, self.height), rng.choice(filters))


def _ring(radii: list[float], start_degrees: float) -> list[Point]:
    step = 2 * math.pi / len(radii)
    start = math.radians(start_degrees)
    return [(r * math.cos(start + i * step), r * math.sin(start + i * step)) for i, r in enumerate(radii)]


def outline(shape: str, rng: random.Random) -> list[Point]:
    """The corners of a shape around the origin, of radius about 1, y downwards."""
    if shape == "circle":
        return _ring([0.95] * 40, 0)
    if shape == "square":
        half = rng.uniform(0.8, 0.9)
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "triangle":
        width, top, base = rng.uniform(0.9, 1.05), rng.uniform(0.9, 1.05), rng.uniform(0.7, 0.85)
        return [(0, -top), (width, base), (-width, base)]
    if shape == "star":
        inner = rng.uniform(0.38, 0.5)
        return _ring([1.08, 1.08 * inner] * 5, -90)
    if shape == "cross":
        arm = rng.uniform(0.26, 0.38)
        corners = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        return [(0.95 * x, 0.95 * y) for x, y in corners + [(-x, -y) for x, y in corners]]
    if shape == "heart":  # https://mathworld.wolfram.com/HeartCurve.html, the sixth curve
        angles = [2 * math.pi * i / 40 for i in range(40)]
        return [
            (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
            for t in angles
        ]
    raise ValueError(f"no drawing for the shape {shape!r}")


def _draw_thing(canvas: _Canvas, thing: Thing, rng: random.Random) -> None:
    x = CENTERS[thing.column] + rng.uniform(-PLACE_JITTER, PLACE_JITTER)
    y = CENTERS[thing.row] + rng.uniform(-PLACE_JITTER, PLACE_JITTER)
    radius = canvas.length(_uniform(rng, RADIUS[thing.size]))
    turn = math.radians(rng.uniform(-12, 12))
    cos, sin = math.cos(turn), math.sin(turn)
    center_x, center_y = canvas.at(x, y)
    points = [
        (center_x + radius * (u * cos - v * sin), center_y + radius * (u * sin + v * cos))
        for u, v in outline(thing.shape, rng)
    ]
    color = shade(thing.color, rng)
    style = rng.random()
    if style < 0.15:
        line_width = max(2 * canvas.scale, round(radius * rng.uniform(0.2, 0.35)))
        canvas.brush.line([*points, *points[:2]], fill=color, width=line_width, joint="curve")
        return
    canvas.brush.polygon(points, fill=color)
    if style < 0.35:
        line_width = max(1, round(canvas.length(rng.uniform(0.012, 0.025))))
        edge = (0, 0, 0) if rng.random() < 0.3 else _darker(color)
        canvas.brush.line([*points, *points[:2]], fill=edge, width=line_width, joint="curve")


@functools.cache
def font_files() -> tuple[str, ...]:
    """Font files that come with matplotlib; the empty name is Pillow's own font."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = (
        *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
        *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique")),
        *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic")),
        *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
        *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"),
    )
    return ("", *(str(folder / f"{name}.ttf") for name in names))


@functools.cache
def _font(file: str, size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(file, size_px) if file else ImageFont.load_default(size_px)


def _bend(layer: Image.Image, center: Point, turn: float, stretch: float, slant: float) -> Image.Image:
    """The layer turned (radians), made wider and slanted around a point, as letters of other fonts are."""
    cos, sin = math.cos(turn), math.sin(turn)
    # where each pixel of the result comes from: turned back, straightened, made narrower
    a, b = (cos + slant * sin) / stretch, (slant * cos - sin) / stretch
    x, y = center
    matrix = (a, b, x - a * x - b * y, sin, cos, y - sin * x - cos * y)
    return layer.transform(layer.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _draw_line(canvas: _Canvas, line: Line, y: float, rng: random.Random) -> None:
    text = rng.choice((line.text, line.text.upper(), line.text.title()))
    file = rng.choice(font_files())
    size_px = round(canvas.length(rng.uniform(0.28, 0.44)))
    widest = 0.92 * canvas.width * canvas.scale
    stroke = rng.choice((0, 0, 0, canvas.scale, canvas.scale, round(size_px * rng.uniform(0.02, 0.045))))
    stretch, slant = rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.25)
    font = _font(file, size_px)
    width = font.getbbox(text, stroke_width=stroke)[2] * stretch + abs(slant) * size_px
    if width > widest:
        stroke = int(stroke * widest / width)
        font = _font(file, int(size_px * widest / width))
    layer = Image.new("L", canvas.image.size)
    free = max(0.0, 1 - width / widest) / 2
    center = canvas.at(0.5 + rng.uniform(-free, free) * 0.6, y + rng.uniform(-0.05, 0.05))
    ImageDraw.Draw(layer).text(center, text, fill=255, font=font, anchor="mm", stroke_width=stroke)
    layer = _bend(layer, center, math.radians(rng.uniform(-6, 6)), stretch, slant)
    canvas.image.paste(shade(line.color, rng), mask=layer)


def _draw_chart(canvas: _Canvas, bars: tuple[Bar, ...], rng: random.Random) -> None:
    left, right = rng.uniform(0.08, 0.18), rng.uniform(0.9, 0.96)
    top, bottom = rng.uniform(0.06, 0.16), rng.uniform(0.84, 0.93)
    step = (bottom - top) / MAX_VALUE
    line_width = max(canvas.scale, round(canvas.length(rng.uniform(0.008, 0.02))))
    ink = _darker(canvas.background, rng.uniform(0.2, 0.5))
    faint = _darker(canvas.background, rng.uniform(0.75, 0.88))
    has_grid = rng.random() < 0.6
    for value in range(1, MAX_VALUE + 1):
        y = bottom - value * step
        ends = [canvas.at(left, y), canvas.at(right if has_grid else left - 0.04, y)]
        canvas.brush.line(ends, fill=faint if has_grid else ink, width=line_width)
    slot = (right - left) / len(bars)
    fill = rng.uniform(0.5, 0.85)
    for index, bar in enumerate(bars):
        x = left + slot * (index + 0.5)
        corner = canvas.at(x - slot * fill / 2, bottom - bar.value * step + rng.uniform(-0.006, 0.006))
        color = shade(bar.color, rng)
        box = [corner, canvas.at(x + slot * fill / 2, bottom)]
        canvas.brush.rectangle(box, fill=color, outline=_darker(color) if rng.random() < 0.3 else None)
    canvas.brush.line(
        [canvas.at(left, top), canvas.at(left, bottom), canvas.at(right, bottom)], fill=ink, width=line_width
    )


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """One RGB picture of the scene, 64 to 172 pixels a side. `rng` decides everything that the scene leaves open."""
    canvas = _Canvas(rng)
    if scene.kind == "chart":
        _draw_chart(canvas, scene.bars, rng)
    for thing in scene.things:
        _draw_thing(canvas, thing, rng)
    for index, line in enumerate(scene.lines):
        _draw_line(canvas, line, 0.5 if len(scene.lines) == 1 else (0.28, 0.72)[index], rng)
    return canvas.finish(rng)
