"""Curves as inline SVG that takes its colors from the page: no script, no separate file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 440, 230  # in the drawing's own coordinates; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 24
NUM_COLORS = 6  # .c0 to .c5 in the page's style sheet

Curve = Sequence[tuple[int, float]]  # (step, value)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two values: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [number * size for number in range(first, math.floor(high / size + 1e-9) + 1)]


def _range(curves: Mapping[str, Curve], line: float | None) -> tuple[float, float]:
    values = [value for curve in curves.values() for _, value in curve if math.isfinite(value)]
    values += [] if line is None else [line]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def chart(curves: Mapping[str, Curve], *, max_step: int, line: float | None = None, line_name: str = "") -> str:
    """Curves over steps 0 to `max_step`, a legend with their last values, and a dashed line at `line` if given.

    A curve of at most 40 points has markers that show their values on hover. Values that are not finite are left out.
    """
    low, high = _range(curves, line)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, max_step)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = []
    for value in ticks(low, high):
        parts.append(f'<path class=grid d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f"<text class=left x={LEFT - 6} y={y(value) + 4:.1f}>{value:.4g}</text>")
    parts += [f"<text class=below x={x(step):.1f} y={HEIGHT - 6}>{step:g}</text>" for step in ticks(0, max_step)
              if float(step).is_integer()]  # fmt: skip
    if line is not None:
        parts.append(
            f'<path class=limit d="M{LEFT} {y(line):.1f}H{WIDTH - RIGHT}"><title>{escape(line_name)}</title></path>'
        )
    legend = []
    for number, (name, curve) in enumerate(curves.items()):
        points = [(step, value) for step, value in curve if math.isfinite(value)]
        color = f"c{number % NUM_COLORS}" + (" second" if number >= NUM_COLORS else "")
        path = " ".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        parts.append(f'<path class="curve {color}" d="M{path}"/>' if points else "")
        if len(points) <= 40:
            parts += [
                f'<circle class="{color}" cx={x(step):.1f} cy={y(value):.1f} r=3><title>{escape(name)} {value:.4g} '
                f"after step {step}</title></circle>"
                for step, value in points
            ]
        last = f"{points[-1][1]:.4g}" if points else "not finite"
        legend.append(f'<li><i class="key {color}"></i>{escape(name)} <b>{last}</b></li>')
    if line is not None:
        legend.append(f'<li><i class="key limit"></i>{escape(line_name)} <b>{line:.4g}</b></li>')
    names = escape(", ".join(curves))
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="Curve of {names}">{"".join(parts)}</svg>'
    return f"{drawing}<ul class=legend>{''.join(legend)}</ul>"
