"""Captions of a scene in several wordings, and the facts that a caption states, to be scored against the scene's."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from mmllm.scenes.world import COLORS, PLACES, SHAPES, SIZES, Bar, Line, Scene, Thing

Fact = tuple[str, str, str]  # (what, attribute, value), as in ("top left", "color", "red")


def at_place(place: str) -> str:
    return "in the center" if place == "center" else f"at the {place}"


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


THING_WORDINGS: tuple[Callable[[Thing], str], ...] = (
    lambda t: f"{with_article(t.size)} {t.color} {t.shape} {at_place(t.place)}",
    lambda t: f"{t.place}: {t.size} {t.color} {t.shape}",
    lambda t: f"{with_article(t.shape)} {at_place(t.place)}, {t.color} and {t.size}",
    lambda t: f"{at_place(t.place)} is {with_article(t.color)} {t.shape}, {t.size}",
    lambda t: f"the {t.color} one {at_place(t.place)} is {with_article(t.size)} {t.shape}",
)
LINE_WORDINGS: tuple[Callable[[Line], str], ...] = (
    lambda x: f"the {x.kind} {x.text} in {x.color}",
    lambda x: f"{x.color} {x.kind}: {x.text}",
)
BAR_WORDINGS: tuple[Callable[[Bar], str], ...] = (
    lambda b: f"{b.color} {b.value}",
    lambda b: f"the {b.color} bar is {b.value}",
)


def caption_clauses(scene: Scene, rng: random.Random, *, shuffled: bool = False) -> list[tuple[str, int | None]]:
    """A caption that states every fact of the scene, as (clause, index of the part in `Scene.parts` that it describes).

    Things come in reading order unless `shuffled`.
    """
    if scene.kind == "text":
        wording = rng.choice(LINE_WORDINGS)
        return [(f"{wording(line)}.", index) for index, line in enumerate(scene.lines)]
    if scene.kind == "chart":
        bar_wording = rng.choice(BAR_WORDINGS)
        ends = "," * (len(scene.bars) - 1) + "."
        clauses = [f"{bar_wording(bar)}{end}" for bar, end in zip(scene.bars, ends, strict=True)]
        return [("a bar chart:", None), *((clause, index) for index, clause in enumerate(clauses))]
    order = list(range(len(scene.things)))
    if shuffled:
        rng.shuffle(order)
    thing_wording = rng.choice(THING_WORDINGS)
    return [(f"{thing_wording(scene.things[index])}.", index) for index in order]


def write_caption(scene: Scene, rng: random.Random, *, shuffled: bool = False) -> str:
    """A caption that states every fact of the scene: the clauses of `caption_clauses` as one text."""
    return " ".join(clause for clause, _ in caption_clauses(scene, rng, shuffled=shuffled))


def facts_of(scene: Scene) -> set[Fact]:
    """Every fact of the scene: shape, color and size of each place, text and color of each line, value of each bar."""
    facts = {(t.place, name, getattr(t, name)) for t in scene.things for name in ("shape", "color", "size")}
    facts |= {(line.kind, name, getattr(line, name)) for line in scene.lines for name in ("text", "color")}
    return facts | {("bar", bar.color, str(bar.value)) for bar in scene.bars}


def _only_word_of(words: tuple[str, ...], text: str) -> str | None:
    """The word of `words` in the text, if there is exactly one."""
    matches = [word for word in re.findall(r"[a-z]+", text) if word in words]
    return matches[0] if len(matches) == 1 else None


def facts_in(caption: str) -> set[Fact]:
    """The facts that a caption states, read clause by clause in any wording of this file. Other text is ignored."""
    caption = caption.lower().strip()
    if "bar chart" in caption:
        pairs = re.findall(rf"\b({'|'.join(COLORS)})(?: bar is)? (\d+)", caption)
        return {("bar", color, value) for color, value in pairs}
    facts: set[Fact] = set()
    for clause in caption.split("."):
        color = _only_word_of(COLORS, clause)
        written = re.search(r"\b(word|number)(?: |: )([a-z0-9]+)", clause)
        if written:
            facts.add((written[1], "text", written[2]))
            if color:
                facts.add((written[1], "color", color))
            continue
        place = next((name for name in PLACES if re.search(rf"\b{name}\b", clause)), None)
        if place is None:
            continue
        values = {"shape": _only_word_of(SHAPES, clause), "color": color, "size": _only_word_of(SIZES, clause)}
        facts |= {(place, name, value) for name, value in values.items() if value}
    return facts


def fact_counts(caption: str, scene: Scene) -> tuple[int, int, int]:
    """(true facts stated, facts stated, facts of the scene) of one picture, to be summed over pictures for an F1."""
    stated, true = facts_in(caption), facts_of(scene)
    return len(stated & true), len(stated), len(true)
