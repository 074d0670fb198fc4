"""Answers a question about scenes by reading its words; written apart from `mmllm.scenes.questions`, to check it.

A question that means no one thing in the scene, or that no rule here reads, is an UnanswerableError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mmllm.scenes.world import COLORS, PLACES, SHAPES, SIZES, WORDS, Bar, Line, Scene, Thing

COLOR, SHAPE, SIZE, PLACE = ("|".join(names) for names in (COLORS, SHAPES, SIZES, PLACES))
AT = r"in the center|at the (?:top|bottom) (?:left|right)"
NOUN = rf"(?:({SIZE}) )?(?:({COLOR}) )?({SHAPE}|object)(?: ({AT}))?"
SIDE = r"left of|right of|above|below"
LEFT_TO_RIGHT = ("left", "center", "right")
TOP_TO_BOTTOM = ("top", "center", "bottom")


class UnanswerableError(ValueError):
    """Not one right answer: the words mean nothing, or more than one thing, in this scene."""


def same(truth: bool) -> str:
    return "yes" if truth else "no"


def only(found: Sequence[str], words: str) -> str:
    if len(found) != 1:
        raise UnanswerableError(f"{words!r} fits {len(found)} things")
    return found[0]


def matching(scene: Scene, words: str) -> list[Thing]:
    """All things that a noun phrase without article fits."""
    found = re.fullmatch(NOUN, words)
    if not found:
        raise UnanswerableError(f"not a thing: {words!r}")
    size, color, shape, place = found.groups()
    wanted = {"size": size, "color": color, "place": place and re.sub("^(in|at) the ", "", place)}
    if shape != "object":
        wanted["shape"] = shape
    return [t for t in scene.things if all(value in (None, getattr(t, name)) for name, value in wanted.items())]


def the(scene: Scene, words: str) -> Thing:
    """The one thing that a noun phrase means."""
    found = matching(scene, words)
    only([thing.place for thing in found], words)
    return found[0]


def bar(scene: Scene, color: str) -> Bar:
    found = [b for b in scene.bars if b.color == color]
    only([b.color for b in found], f"{color} bar")
    return found[0]


def line(scene: Scene, kind: str) -> Line:
    found = [one for one in scene.lines if one.kind == kind]
    only([one.text for one in found], kind)
    return found[0]


def lies(one: Thing, side: str, other: Thing) -> bool:
    """Whether one thing is left of, right of, above or below the other."""
    x, y = (LEFT_TO_RIGHT.index(t.place.split()[-1]) for t in (one, other))
    row, other_row = (TOP_TO_BOTTOM.index(t.place.split()[0]) for t in (one, other))
    return {"left of": x < y, "right of": x > y, "above": row < other_row, "below": row > other_row}[side]


def singular(words: str) -> str:
    return "cross" if words == "crosses" else words.removesuffix("s")


def named(scene: Scene, kinds: str) -> int:
    """How many there are of a plural: `circles`, `red objects`, `bars`."""
    return len(scene.bars) if kinds == "bars" else len(matching(scene, singular(kinds)))


def there_is(scene: Scene, words: str) -> bool:
    """Whether the picture shows this, named without article."""
    if words == "bar chart":
        return bool(scene.bars)
    if words in ("word", "number"):
        return any(one.kind == words for one in scene.lines)
    if found := re.fullmatch(rf"({COLOR}) bar", words):
        return any(b.color == found[1] for b in scene.bars)
    return bool(matching(scene, words))


def shape_beside(scene: Scene, side: str, words: str) -> str:
    anchor = the(scene, words)
    return only([t.shape for t in scene.things if lies(t, side, anchor)], f"{side} the {words}")


def larger(scene: Scene, word: str, first: str, second: str) -> str:
    one, other = the(scene, first), the(scene, second)
    if one.size == other.size:
        raise UnanswerableError(f"both are {one.size}")
    return first if (one.size == "large") == (word == "larger") else second


def taller(scene: Scene, first: str, word: str, second: str) -> str:
    one, other = bar(scene, first).value, bar(scene, second).value
    if one == other:
        raise UnanswerableError(f"both bars are {one}")
    return same(one > other if word == "taller" else one < other)


def extreme_bar(scene: Scene, word: str) -> str:
    values = sorted(b.value for b in scene.bars)
    extreme = values[-1 if word == "tallest" else 0] if values else None
    return only([b.color for b in scene.bars if b.value == extreme], word)


def alike(scene: Scene, first: str, second: str, name: str) -> str:
    one, other = the(scene, first), the(scene, second)
    if one == other:
        raise UnanswerableError(f"{first!r} and {second!r} are one thing")
    return same(getattr(one, name) == getattr(other, name))


def beside(scene: Scene, first: str, side: str, second: str) -> str:
    one, other = the(scene, first), the(scene, second)
    if one == other:
        raise UnanswerableError(f"{first!r} and {second!r} are one thing")
    return same(lies(one, side, other))


# An attribute of one thing, asked in a sentence of its own: what a follow-up takes up again.
ATTRIBUTE = (
    (r"what (color|shape|size) is the (.+)\?", lambda name, words: (name, words)),
    (r"what is the (color|shape|size|value) of the (.+)\?", lambda name, words: (name, words)),
    (r"is the (.+) small or large\?", lambda words: ("size", words)),
    (r"where (?:in the picture )?is the (.+)\?", lambda words: ("place", words)),
    (r"how tall is the (.+)\?", lambda words: ("value", words)),
)


def attribute_in(question: str) -> tuple[str, str] | None:
    """(attribute, noun phrase) of a question after one attribute of one thing, bar, word or number."""
    for pattern, take in ATTRIBUTE:
        if found := re.fullmatch(pattern, question):
            return take(*found.groups())
    return None


def attribute(scene: Scene, name: str, words: str) -> str:
    if words in ("word", "number"):
        return str(getattr(line(scene, words), name))
    if words.endswith(" bar"):
        return str(getattr(bar(scene, words.removesuffix(" bar")), name))
    return str(getattr(the(scene, words), name))


# fmt: off
RULES: tuple[tuple[str, Callable[..., str]], ...] = (
    (rf"what shape is ({SIDE}) the ({NOUN})\?", lambda s, side, words, *_: shape_beside(s, side, words)),
    (rf"is the (.+) ({SIDE}) the (.+)\?", beside),
    (r"how many (.+) are there\?", lambda s, kinds: str(named(s, kinds))),
    (rf"is there anything ({AT})\?", lambda s, place: same(bool(matching(s, f"object {place}")))),
    (r"is there an? (.+)\?", lambda s, words: same(there_is(s, words))),
    (rf"is the ({COLOR}) bar (taller|shorter) than the ({COLOR}) bar\?", taller),
    (r"are there more (.+) than (.+)\?", lambda s, first, second: same(named(s, first) > named(s, second))),
    (r"which is (larger|smaller), the (.+) or the (.+)\?", larger),
    (r"are the (.+) and the (.+) the same (color|shape|size)\?", alike),
    (r"what (word|number) is written\?", lambda s, kind: line(s, kind).text),
    (r"read the (word|number)\.", lambda s, kind: line(s, kind).text),
    (r"what does it say\?", lambda s: only([one.text for one in s.lines], "it")),
    (r"which bar has the value (\d)\?", lambda s, v: only([b.color for b in s.bars if str(b.value) == v], v)),
    (r"which bar is the (tallest|shortest)\?", extreme_bar),
)
# fmt: on


def follow_up(scene: Scene, before: str, question: str) -> str | None:
    """The answer to a question that needs the one before it; None where it is no such question."""
    asked = attribute_in(before)
    if asked is None:
        return None
    name, words = asked
    if question == "and the other one?":
        thing = the(scene, words)
        others = [t for t in scene.things if t.shape == thing.shape and t != thing]
        return only([str(getattr(t, name)) for t in others], question)
    if found := re.fullmatch(r"and the (.+)\?", question):
        return attribute(scene, name, found[1])
    if question == "where is it?":
        return the(scene, words).place
    if found := re.fullmatch(r"what (color|shape|size) is it\?", question):
        return attribute(scene, found[1], words)
    return None


def answer_two(first: Scene, second: Scene, question: str) -> str:
    if question == "are the two pictures the same or different?":
        return "same" if set(first.things) == set(second.things) else "different"
    if question == "which picture has more objects?":
        counts = [len(first.things), len(second.things)]
        return only([f"picture {n + 1}" for n in (0, 1) if counts[n] > counts[1 - n]], question)
    if found := re.fullmatch(r"which picture has an? (.+)\?", question):
        has = [there_is(scene, found[1]) for scene in (first, second)]
        return only([f"picture {n + 1}" for n in (0, 1) if has[n]], question)
    raise UnanswerableError(f"no rule reads {question!r}")


def answer(scenes: Sequence[Scene], questions: Sequence[str]) -> str:
    """The right answer to the last of these questions; those before it are what it may refer to."""
    question = questions[-1]
    if len(scenes) == 2:
        return answer_two(scenes[0], scenes[1], question)
    scene = scenes[0]
    if len(questions) > 1 and (reply := follow_up(scene, questions[-2], question)) is not None:
        return reply
    for pattern, rule in RULES:
        if found := re.fullmatch(pattern, question):
            return rule(scene, *found.groups())
    if asked := attribute_in(question):
        return attribute(scene, *asked)
    raise UnanswerableError(f"no rule reads {question!r}")


# fmt: off
THING_CLAUSES = tuple(re.compile(text) for text in (
    rf"an? (?P<size>{SIZE}) (?P<color>{COLOR}) (?P<shape>{SHAPE}) (?P<at>{AT})",
    rf"(?P<at>{PLACE}): (?P<size>{SIZE}) (?P<color>{COLOR}) (?P<shape>{SHAPE})",
    rf"an? (?P<shape>{SHAPE}) (?P<at>{AT}), (?P<color>{COLOR}) and (?P<size>{SIZE})",
    rf"(?P<at>{AT}) is an? (?P<color>{COLOR}) (?P<shape>{SHAPE}), (?P<size>{SIZE})",
    rf"the (?P<color>{COLOR}) one (?P<at>{AT}) is an? (?P<size>{SIZE}) (?P<shape>{SHAPE})",
))
LINE_CLAUSES = tuple(re.compile(text) for text in (
    rf"the (?P<kind>word|number) (?P<text>{'|'.join(WORDS)}|\d\d?) in (?P<color>{COLOR})",
    rf"(?P<color>{COLOR}) (?P<kind>word|number): (?P<text>{'|'.join(WORDS)}|\d\d?)",
))
# fmt: on


def read_caption(caption: str) -> Scene:
    """The scene that a caption tells, read strictly: every clause must be of a known wording."""
    text = caption.removesuffix(".")
    if chart := re.fullmatch(r"a bar chart: (.+)", text):
        found = [re.fullmatch(rf"(?:the )?({COLOR})(?: bar is)? (\d)", clause) for clause in chart[1].split(", ")]
        if all(found):
            return Scene("chart", bars=tuple(Bar(one[1], int(one[2])) for one in found if one))
    things, lines = [], []
    for clause in text.split(". "):
        if found := next((m for pattern in THING_CLAUSES if (m := pattern.fullmatch(clause))), None):
            parts = found.groupdict()
            place = re.sub("^(in|at) the ", "", parts.pop("at"))
            things.append(Thing(place=place, **parts))
        elif found := next((m for pattern in LINE_CLAUSES if (m := pattern.fullmatch(clause))), None):
            lines.append(Line(**found.groupdict()))  # type: ignore[arg-type]
        else:
            raise UnanswerableError(f"no rule reads {clause!r}")
    things.sort(key=lambda thing: list(PLACES).index(thing.place))
    return Scene("objects" if things else "text", things=tuple(things), lines=tuple(lines))
