"""The embedded world: what a scene is, how one is sampled, and which split it belongs to.

A scene is one of three kinds: `objects` (1 to 5 objects, at most one in a place), `text` (a word, a number or both)
and `chart` (2 to 4 bars). A scene's split follows from its content alone, so no scene of one split is in another.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from mmllm.errors import MmllmError

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = ("small", "large")
# {place: (column, row)}; 0 is left or top, 1 the middle, 2 right or bottom
PLACES: dict[str, tuple[int, int]] = {
    "top left": (0, 0),
    "top right": (2, 0),
    "center": (1, 1),
    "bottom left": (0, 2),
    "bottom right": (2, 2),
}
# fmt: off
WORDS = ("sun", "moon", "tree", "fish", "bird", "cat", "dog", "car", "bus", "book",
         "cup", "hat", "door", "key", "milk", "rain", "snow", "lamp", "boat", "leaf")
# fmt: on
MAX_NUMBER = 99
MAX_VALUE = 5

Split = Literal["train", "val", "compositions"]
SPLITS: tuple[Split, ...] = get_args(Split)
Kind = Literal["objects", "text", "chart"]


@dataclass(frozen=True)
class Thing:
    """One drawn object."""

    shape: str
    color: str
    size: str
    place: str

    @property
    def column(self) -> int:
        return PLACES[self.place][0]

    @property
    def row(self) -> int:
        return PLACES[self.place][1]


@dataclass(frozen=True)
class Line:
    """One line of drawn text: a word or a number, and its color."""

    kind: Literal["word", "number"]
    text: str
    color: str


@dataclass(frozen=True)
class Bar:
    """One bar of a chart; `value` is 1 to MAX_VALUE, the top of the axis."""

    color: str
    value: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows: things in reading order, lines from the top, bars from the left."""

    kind: Kind
    things: tuple[Thing, ...] = ()
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()

    @property
    def parts(self) -> tuple[Thing | Line | Bar, ...]:
        """Everything that the scene shows, in order."""
        return (*self.things, *self.lines, *self.bars)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Scene:
        """The scene of a scene-graph file. Raises MmllmError where a part is missing or unknown."""
        try:
            return Scene(
                kind=data["kind"],
                things=tuple(Thing(**thing) for thing in data["things"]),
                lines=tuple(Line(**line) for line in data["lines"]),
                bars=tuple(Bar(**bar) for bar in data["bars"]),
            )
        except (KeyError, TypeError) as error:
            raise MmllmError(
                f"not a scene graph ({error}); expected kind, things, lines and bars as `mmllm scenes` writes them"
            ) from error


def _is_one_in(fraction: int, text: str) -> bool:
    return zlib.crc32(text.encode()) % fraction == 0


def is_held_out(part: Thing | Line | Bar) -> bool:
    """Whether only `compositions` shows this combination (color-shape-place, color-word or color-value)."""
    if isinstance(part, Thing):
        return _is_one_in(7, f"{part.color} {part.shape} {part.place}")
    if isinstance(part, Line):
        return _is_one_in(7, f"{part.color} {part.text}")
    return _is_one_in(7, f"{part.color} {part.value}")


def split_of(scene: Scene) -> Split:
    """`compositions` if the scene has a held-out combination; of the other scenes, one in 16 is `val`."""
    if any(is_held_out(part) for part in scene.parts):
        return "compositions"
    return "val" if _is_one_in(16, json.dumps(scene.to_json(), sort_keys=True)) else "train"


KIND_WEIGHTS: dict[Kind, int] = {"objects": 70, "text": 15, "chart": 15}
COUNT_WEIGHTS = (2, 4, 5, 5, 3)  # of scenes with 1, 2, ... objects


def _sample_things(rng: random.Random) -> tuple[Thing, ...]:
    count = rng.choices(range(1, len(PLACES) + 1), COUNT_WEIGHTS)[0]
    things: list[Thing] = []
    for place in sorted(rng.sample(list(PLACES), count), key=list(PLACES).index):
        # Repeats are intended: counting, "the other one" and hard negatives need objects that share attributes.
        shape = rng.choice(things).shape if things and rng.random() < 0.3 else rng.choice(SHAPES)
        color = rng.choice(things).color if things and rng.random() < 0.25 else rng.choice(COLORS)
        things.append(Thing(shape, color, rng.choice(SIZES), place))
    return tuple(things)


def _sample_lines(rng: random.Random) -> tuple[Line, ...]:
    word = Line("word", rng.choice(WORDS), rng.choice(COLORS))
    number = Line("number", str(rng.randint(0, MAX_NUMBER)), rng.choice(COLORS))
    return rng.choice(((word,), (number,), (word, number), (number, word)))


def _sample_bars(rng: random.Random) -> tuple[Bar, ...]:
    colors = rng.sample(COLORS, rng.randint(2, 4))
    return tuple(Bar(color, rng.randint(1, MAX_VALUE)) for color in colors)


def sample_kind(rng: random.Random, weights: Mapping[Kind, int]) -> Kind:
    return rng.choices(list(weights), list(weights.values()))[0]


def sample_any_scene(rng: random.Random, kind: Kind | None = None) -> Scene:
    """A scene of any split; seven in ten show objects."""
    kind = kind or sample_kind(rng, KIND_WEIGHTS)
    if kind == "objects":
        return Scene("objects", things=_sample_things(rng))
    if kind == "text":
        return Scene("text", lines=_sample_lines(rng))
    return Scene("chart", bars=_sample_bars(rng))


def _other_value(rng: random.Random, values: Iterable[Any], old: Any) -> Any:
    return rng.choice([value for value in values if value != old])


def change_one_attribute(scene: Scene, rng: random.Random) -> Scene:
    """The same scene except for one attribute of one part: a near miss, of any split."""
    if scene.kind == "objects":
        things = list(scene.things)
        index = rng.randrange(len(things))
        name = rng.choice(("color", "shape", "size", "place"))
        values: dict[str, Iterable[str]] = {"color": COLORS, "shape": SHAPES, "size": SIZES, "place": PLACES}
        taken = {thing.place for thing in things if name == "place"}
        if taken == set(PLACES):
            name, taken = "size", set()
        old = getattr(things[index], name)
        things[index] = replace(
            things[index], **{name: _other_value(rng, [v for v in values[name] if v not in taken], old)}
        )
        return replace(scene, things=tuple(sorted(things, key=lambda t: list(PLACES).index(t.place))))
    if scene.kind == "text":
        lines = list(scene.lines)
        index = rng.randrange(len(lines))
        line = lines[index]
        if rng.random() < 0.3:
            lines[index] = replace(line, color=_other_value(rng, COLORS, line.color))
        elif line.kind == "word":
            lines[index] = replace(line, text=_other_value(rng, WORDS, line.text))
        else:
            lines[index] = replace(line, text=str(_other_value(rng, range(MAX_NUMBER + 1), int(line.text))))
        return replace(scene, lines=tuple(lines))
    bars = list(scene.bars)
    index = rng.randrange(len(bars))
    if rng.random() < 0.3:
        bars[index] = replace(
            bars[index],
            color=_other_value(rng, [c for c in COLORS if c not in {bar.color for bar in bars}], bars[index].color),
        )
    else:
        bars[index] = replace(bars[index], value=_other_value(rng, range(1, MAX_VALUE + 1), bars[index].value))
    return replace(scene, bars=tuple(bars))


def sample_scene(rng: random.Random, split: Split, kind: Kind | None = None) -> Scene:
    """A scene of this split: scenes are sampled until one belongs to it."""
    while True:
        scene = sample_any_scene(rng, kind)
        if split_of(scene) == split:
            return scene


MAX_NEAR_MISSES = 64


def near_miss(scene: Scene, rng: random.Random, split: Split) -> Scene:
    """`change_one_attribute` within this split; a new scene of this kind where (nearly) all changes leave it."""
    for _ in range(MAX_NEAR_MISSES):
        changed = change_one_attribute(scene, rng)
        if split_of(changed) == split:
            return changed
    return sample_scene(rng, split, scene.kind)
