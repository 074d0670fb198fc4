"""Questions in strangers' own words about new scenes: `own_words.json`, by people who never saw training's wordings."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mmllm.scenes.absent import ABSENT
from mmllm.scenes.draw import draw
from mmllm.scenes.questions import about_all, pick_reference, plural
from mmllm.scenes.wordings import UNKNOWN, UNKNOWN_ANSWER
from mmllm.scenes.world import COLORS, SHAPES, Scene, sample_scene

WORDINGS: dict[str, list[str]] = json.loads(Path(__file__).parent.with_name("own_words.json").read_text())


class Asked(NamedTuple):
    picture: Image.Image
    type: str
    question: str
    answer: str


def _about_things(scene: Scene, rng: random.Random) -> Iterator[tuple[str, dict[str, str], str]]:
    """(intent, its slots, answer) of questions about a scene of objects."""
    yield "count_all", {}, str(len(scene.things))
    name = rng.choice(("shape", "color"))
    values = [getattr(thing, name) for thing in scene.things]
    value = rng.choice(values)
    noun = value if name == "shape" else f"{value} object"
    yield "count", {"plural": plural(noun)}, str(values.count(value))
    shown = {f"{thing.color} {thing.shape}" for thing in scene.things}
    absent = [pair for color in COLORS for shape in SHAPES if (pair := f"{color} {shape}") not in shown]
    yield "exists", {"noun": rng.choice(sorted(shown))}, "yes"
    yield "exists", {"noun": rng.choice(absent)}, "no"
    for name in ("color", "shape", "size", "place"):
        thing = rng.choice(scene.things)
        if reference := pick_reference(scene, thing, rng, name):
            yield name, {"noun": reference}, getattr(thing, name)
    shape = rng.choice([shape for shape in SHAPES if shape not in {thing.shape for thing in scene.things}])
    yield rng.choice(("color", "size", "place")), {"noun": shape}, f"there is no {shape}."
    if len(scene.things) < 2:
        return
    one, other = rng.sample(scene.things, 2)
    names = [pick_reference(scene, thing, rng, "color") for thing in (one, other)]
    if all(names):
        slots = dict(zip(("first", "second"), map(str, names), strict=True))
        yield "same_color", slots, "yes" if one.color == other.color else "no"
    names = [pick_reference(scene, thing, rng, "place") for thing in (one, other)]
    if all(names):
        slots = dict(zip(("first", "second"), map(str, names), strict=True))
        yield "left_of", slots, "yes" if one.column < other.column else "no"
    names = [pick_reference(scene, thing, rng, "size", "place") for thing in (one, other)]
    if all(names) and one.size != other.size:
        slots = dict(zip(("first", "second"), map(str, names), strict=True))
        yield "larger", slots, str(names[0 if one.size == "large" else 1])


def _about(scene: Scene, rng: random.Random) -> Iterator[tuple[str, dict[str, str], str]]:
    if scene.kind == "objects":
        yield from _about_things(scene, rng)
    elif scene.kind == "text" and len(scene.lines) == 1:
        yield scene.lines[0].kind, {}, scene.lines[0].text
    elif scene.kind == "chart":
        bar = rng.choice(scene.bars)
        yield "bar_value", {"color": bar.color}, str(bar.value)
        values = [str(bar.value) for bar in scene.bars]
        for intent, extreme in (("tallest", max(values)), ("shortest", min(values))):
            if len(group := about_all(values, extreme)[0]) == 1:
                yield intent, {}, scene.bars[group[0]].color


def ask_in_own_words(num_scenes: int, seed: int) -> list[Asked]:
    """Questions about new scenes of the val split; one in ten asks what no picture answers."""
    rng = random.Random(seed)
    asked = []
    for _ in range(num_scenes):
        scene = sample_scene(rng, "val")
        picture = draw(scene, rng)
        for intent, slots, answer in _about(scene, rng):
            question = rng.choice(WORDINGS[intent]).format(**slots)
            kind = ABSENT if answer.startswith("there is no ") else intent
            asked.append(Asked(picture, kind, question, answer))
            if rng.random() < 0.1:
                asked.append(Asked(picture, UNKNOWN, rng.choice(WORDINGS[UNKNOWN]), UNKNOWN_ANSWER))
    return asked
