"""Questions about one scene, each with its only right answer: a plain dict of question types.

An asker returns the turns of one question (a follow-up comes with the turn before it), or none where the scene allows
no such question. The answers yes and no are equally frequent, and a "no" is a near miss wherever one exists.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mmllm.scenes.captions import at_place, with_article, write_caption
from mmllm.scenes.world import COLORS, PLACES, SHAPES, SIZES, Bar, Line, Scene, Thing

About = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class QuestionTurn:
    """One question and its answer. To understand it, the `num_needed` turns directly before it are needed.

    `about` says where in the scene the answer is found: for each thing that the question names, in order, the parts
    (indices into `Scene.parts`) that it means. With two scenes, the indices of the second go on after the first's.
    `compared` are the two values that decide a comparison, such as both colors. `plain` is the question before it was
    put into other words.
    """

    type: str
    question: str
    answer: str
    num_needed: int = 0
    about: About = ()
    compared: tuple[str, str] | None = None
    plain: str | None = None


Asker = Callable[[Scene, random.Random], list[QuestionTurn]]
RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda x, y: x.column < y.column,
    "right of": lambda x, y: x.column > y.column,
    "above": lambda x, y: x.row < y.row,
    "below": lambda x, y: x.row > y.row,
}
ATTRIBUTE_QUESTIONS = {
    "color": ("what color is the {}?", "what is the color of the {}?"),
    "shape": ("what shape is the {}?", "what is the shape of the {}?"),
    "size": ("what size is the {}?", "is the {} small or large?"),
    "place": ("where is the {}?", "where in the picture is the {}?"),
}
LINE_QUESTIONS = ("what {} is written?", "read the {}.")
BAR_QUESTIONS = ("what is the value of the {} bar?", "how tall is the {} bar?")
CAPTION_REQUESTS = ("describe the picture.", "what is in the picture?", "what do you see?", "write a caption.")


def plural(noun: str) -> str:
    """The plural of a noun, which may have adjectives before it."""
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def about_each(scene: Scene, *parts: Thing | Line | Bar) -> About:
    """`QuestionTurn.about` of a question that names these parts one by one."""
    return tuple((scene.parts.index(part),) for part in parts)


def about_all(values: Sequence[str], value: str) -> About:
    """`QuestionTurn.about` of a question about all parts with this value; `values` has the value of each part."""
    indices = tuple(index for index, part_value in enumerate(values) if part_value == value)
    return (indices,) if indices else ()


def references(scene: Scene, thing: Thing, hidden: Iterable[str] = ()) -> list[str]:
    """Noun phrases, without article, that fit this thing only and do not reveal its `hidden` attributes."""
    hidden = set(hidden)
    phrases = []
    for names in (("shape",), ("color",), ("color", "shape"), ("size", "shape"), ("size", "color"), ("place",)):
        if hidden & set(names):
            continue
        if sum(all(getattr(t, n) == getattr(thing, n) for n in names) for t in scene.things) == 1:
            words = [getattr(thing, n) for n in names if n != "place"]
            noun = " ".join(words if "shape" in names else [*words, "object"])
            phrases.append(f"{noun} {at_place(thing.place)}" if "place" in names else noun)
    if "shape" not in hidden and "place" not in hidden:
        phrases.append(f"{thing.shape} {at_place(thing.place)}")
    return phrases


def pick_reference(scene: Scene, thing: Thing, rng: random.Random, *hidden: str) -> str | None:
    """One of the `references`, or None where there is none."""
    phrases = references(scene, thing, hidden)
    return rng.choice(phrases) if phrases else None


def ask_attribute(name: str) -> Asker:
    """An asker for the `color`, `shape`, `size` or `place` of one object."""

    def ask(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
        if not scene.things:
            return []
        thing = rng.choice(scene.things)
        subject = pick_reference(scene, thing, rng, name)
        if subject is None:
            return []
        question = rng.choice(ATTRIBUTE_QUESTIONS[name]).format(subject)
        return [QuestionTurn(name, question, getattr(thing, name), about=about_each(scene, thing))]

    return ask


def ask_relation(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    if len(scene.things) < 2:
        return []
    name = rng.choice(list(RELATIONS))
    if rng.random() < 0.3:
        anchor = rng.choice(scene.things)
        related = [t for t in scene.things if RELATIONS[name](t, anchor)]
        subject = pick_reference(scene, anchor, rng, "place")
        if len(related) == 1 and subject:
            about = about_each(scene, anchor)
            return [QuestionTurn("relation", f"what shape is {name} the {subject}?", related[0].shape, about=about)]
    is_true = rng.random() < 0.5
    pairs = [(x, y) for x in scene.things for y in scene.things if x != y and RELATIONS[name](x, y) == is_true]
    if not pairs:
        return []
    x, y = rng.choice(pairs)
    first, second = pick_reference(scene, x, rng, "place"), pick_reference(scene, y, rng, "place")
    if not first or not second:
        return []
    return [
        QuestionTurn("relation", f"is the {first} {name} the {second}?", yes_no(is_true), about=about_each(scene, x, y))
    ]


def ask_count(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    if scene.kind == "chart":
        return [QuestionTurn("count", "how many bars are there?", str(len(scene.bars)))]
    if not scene.things:
        return []
    names = rng.choice(((), ("shape",), ("shape",), ("color",), ("size",)))
    if not names:
        return [QuestionTurn("count", "how many objects are there?", str(len(scene.things)))]
    name = names[0]
    present = [getattr(t, name) for t in scene.things]
    # mostly a value that is present: a count of zero is the subject of `exists`
    choices = {"shape": SHAPES, "color": COLORS, "size": SIZES}[name]
    value = rng.choice(present) if rng.random() < 0.85 else rng.choice(choices)
    noun = plural(value) if name == "shape" else f"{value} objects"
    about = about_all(present, value)
    return [QuestionTurn("count", f"how many {noun} are there?", str(present.count(value)), about=about)]


def _near_misses(scene: Scene) -> list[str]:
    """Color-shape pairs that are absent although the color and the shape are both present."""
    present = {(t.color, t.shape) for t in scene.things}
    colors, shapes = sorted({c for c, _ in present}), sorted({s for _, s in present})
    return [f"{c} {s}" for c in colors for s in shapes if (c, s) not in present]


def ask_exists(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    is_true = rng.random() < 0.5
    if scene.kind != "objects":
        kinds = {"chart": "bar chart", "text": rng.choice(("word", "number"))}
        noun = kinds[rng.choice(("chart", "text"))]
        shown = {"bar chart"} if scene.kind == "chart" else {line.kind for line in scene.lines}
        if scene.kind == "chart" and rng.random() < 0.7:
            colors = [b.color for b in scene.bars]
            color = rng.choice(colors if is_true else [c for c in COLORS if c not in colors])
            return [
                QuestionTurn(
                    "exists", f"is there {with_article(color)} bar?", yes_no(is_true), about=about_all(colors, color)
                )
            ]
        return [QuestionTurn("exists", f"is there {with_article(noun)}?", yes_no(noun in shown))]
    form = rng.choice(("pair", "pair", "shape", "color", "place"))
    if form == "place":
        taken = [t.place for t in scene.things]
        places = [p for p in PLACES if (p in taken) == is_true]
        if not places:
            return []
        place = rng.choice(places)
        return [
            QuestionTurn(
                "exists", f"is there anything {at_place(place)}?", yes_no(is_true), about=about_all(taken, place)
            )
        ]
    if form == "pair":
        present = [f"{t.color} {t.shape}" for t in scene.things]
        absent = _near_misses(scene) or [f"{rng.choice(COLORS)} {t.shape}" for t in scene.things]
    elif form == "shape":
        present, absent = [t.shape for t in scene.things], list(SHAPES)
    else:
        present, absent = [f"{t.color} object" for t in scene.things], [f"{c} object" for c in COLORS]
    nouns = present if is_true else [noun for noun in absent if noun not in present]
    if not nouns:
        return []
    noun = rng.choice(nouns)
    return [QuestionTurn("exists", f"is there {with_article(noun)}?", yes_no(is_true), about=about_all(present, noun))]


def _compare_bars(scene: Scene, rng: random.Random, is_true: bool) -> list[QuestionTurn]:
    x, y = rng.sample(scene.bars, 2)
    if x.value == y.value:
        return []
    taller = rng.choice(("taller", "shorter"))
    if (x.value > y.value) != (is_true == (taller == "taller")):
        x, y = y, x
    question = f"is the {x.color} bar {taller} than the {y.color} bar?"
    values = str(x.value), str(y.value)
    return [QuestionTurn("compare", question, yes_no(is_true), about=about_each(scene, x, y), compared=values)]


def _compare_counts(scene: Scene, rng: random.Random, is_true: bool) -> list[QuestionTurn]:
    shapes = sorted({t.shape for t in scene.things})
    counts = {s: sum(t.shape == s for t in scene.things) for s in shapes}
    pairs = [(s, t) for s in shapes for t in shapes if s != t and (counts[s] > counts[t]) == is_true]
    if not pairs:
        return []
    pair = rng.choice(pairs)
    first, second = map(plural, pair)
    about = tuple(group for shape in pair for group in about_all([t.shape for t in scene.things], shape))
    values = str(counts[pair[0]]), str(counts[pair[1]])
    question = f"are there more {first} than {second}?"
    return [QuestionTurn("compare", question, yes_no(is_true), about=about, compared=values)]


def _compare_sizes(scene: Scene, rng: random.Random, one: Thing, other: Thing) -> list[QuestionTurn]:
    first, second = pick_reference(scene, one, rng, "size", "place"), pick_reference(scene, other, rng, "size", "place")
    if one.size == other.size or not first or not second:
        return []
    word = rng.choice(("larger", "smaller"))
    answer = first if (one.size == "large") == (word == "larger") else second
    question = f"which is {word}, the {first} or the {second}?"
    return [
        QuestionTurn("compare", question, answer, about=about_each(scene, one, other), compared=(one.size, other.size))
    ]


def _compare_attribute(scene: Scene, rng: random.Random, is_true: bool) -> list[QuestionTurn]:
    name = rng.choice(("color", "shape", "size"))
    pairs = [(x, y) for x in scene.things for y in scene.things if x != y]
    fitting = [(x, y) for x, y in pairs if (getattr(x, name) == getattr(y, name)) == is_true]
    if not fitting:
        return []
    one, other = rng.choice(fitting)
    first, second = pick_reference(scene, one, rng, name), pick_reference(scene, other, rng, name)
    if not first or not second:
        return []
    question = f"are the {first} and the {second} the same {name}?"
    values = getattr(one, name), getattr(other, name)
    return [QuestionTurn("compare", question, yes_no(is_true), about=about_each(scene, one, other), compared=values)]


def ask_compare(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    is_true = rng.random() < 0.5
    if scene.kind == "chart":
        return _compare_bars(scene, rng, is_true)
    if len(scene.things) < 2:
        return []
    one, other = rng.sample(scene.things, 2)
    form = rng.choice(("larger", "same", "more"))
    if form == "more":
        return _compare_counts(scene, rng, is_true)
    return _compare_sizes(scene, rng, one, other) if form == "larger" else _compare_attribute(scene, rng, is_true)


def ask_text(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    if not scene.lines:
        return []
    line = rng.choice(scene.lines)
    if rng.random() < 0.3:
        return [QuestionTurn("text", f"what color is the {line.kind}?", line.color, about=about_each(scene, line))]
    wordings = [question.format(line.kind) for question in LINE_QUESTIONS]
    if len(scene.lines) == 1:
        wordings.append("what does it say?")
    return [QuestionTurn("text", rng.choice(wordings), line.text, about=about_each(scene, line))]


def ask_chart(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    if not scene.bars:
        return []
    form = rng.choice(("value", "value", "most", "least", "which"))
    values = [bar.value for bar in scene.bars]
    bar = rng.choice(scene.bars)
    if form == "value":
        wording = rng.choice(BAR_QUESTIONS)
        return [QuestionTurn("chart", wording.format(bar.color), str(bar.value), about=about_each(scene, bar))]
    if form == "which":
        if values.count(bar.value) != 1:
            return []
        question = f"which bar has the value {bar.value}?"
        return [QuestionTurn("chart", question, bar.color, about=about_each(scene, bar))]
    extreme = max(values) if form == "most" else min(values)
    if values.count(extreme) != 1:
        return []
    word = "tallest" if form == "most" else "shortest"
    index = values.index(extreme)
    return [QuestionTurn("chart", f"which bar is the {word}?", scene.bars[index].color, about=((index,),))]


def _ask_same_shape(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    pairs = [(x, y) for x in scene.things for y in scene.things if x != y and x.shape == y.shape]
    pairs = [(x, y) for x, y in pairs if sum(t.shape == x.shape for t in scene.things) == 2]
    if not pairs:
        return []
    one, other = rng.choice(pairs)
    name = rng.choice(("color", "size"))
    question = ATTRIBUTE_QUESTIONS[name][0].format(f"{one.shape} {at_place(one.place)}")
    follow = QuestionTurn("follow_up", "and the other one?", getattr(other, name), 1, about_each(scene, other))
    return [QuestionTurn(name, question, getattr(one, name), about=about_each(scene, one)), follow]


def ask_follow_up(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    if scene.kind == "chart":
        one, other = rng.sample(scene.bars, 2)
        question = BAR_QUESTIONS[0].format(one.color)
        first = QuestionTurn("chart", question, str(one.value), about=about_each(scene, one))
        about = about_each(scene, other)
        return [first, QuestionTurn("follow_up", f"and the {other.color} bar?", str(other.value), 1, about)]
    if rng.random() < 0.5 and (turns := _ask_same_shape(scene, rng)):
        return turns
    name = rng.choice(list(ATTRIBUTE_QUESTIONS))
    turns = ask_attribute(name)(scene, rng)
    if not turns:
        return []
    if rng.random() < 0.5:
        others = [t for t in scene.things if f"the {t.shape}?" not in turns[0].question]
        named = [
            (t, ref) for t in others if (ref := pick_reference(scene, t, rng, name)) and ref not in turns[0].question
        ]
        if not named:
            return []
        thing, other_subject = rng.choice(named)
        about = about_each(scene, thing)
        return [*turns, QuestionTurn("follow_up", f"and the {other_subject}?", getattr(thing, name), 1, about)]
    thing = rng.choice(scene.things)
    second = rng.choice([n for n in ATTRIBUTE_QUESTIONS if n != name])
    subject = pick_reference(scene, thing, rng, name, second)
    if subject is None:
        return []
    about = about_each(scene, thing)
    first = QuestionTurn(name, ATTRIBUTE_QUESTIONS[name][0].format(subject), getattr(thing, name), about=about)
    wording = "where is it?" if second == "place" else f"what {second} is it?"
    return [first, QuestionTurn("follow_up", wording, getattr(thing, second), 1, about)]


def ask_caption(scene: Scene, rng: random.Random) -> list[QuestionTurn]:
    return [QuestionTurn("caption", rng.choice(CAPTION_REQUESTS), write_caption(scene, rng))]


QUESTION_TYPES: dict[str, Asker] = {
    "color": ask_attribute("color"),
    "shape": ask_attribute("shape"),
    "size": ask_attribute("size"),
    "place": ask_attribute("place"),
    "relation": ask_relation,
    "count": ask_count,
    "exists": ask_exists,
    "compare": ask_compare,
    "text": ask_text,
    "chart": ask_chart,
    "follow_up": ask_follow_up,
    "caption": ask_caption,
}


def ask_about(scene: Scene, rng: random.Random, num_turns: int, types: Sequence[str] = ()) -> list[QuestionTurn]:
    """About `num_turns` turns of these types (default: all) on one scene: no question twice, at most one caption.

    A type that `types` names several times is asked more often.
    """
    names = list(types) or list(QUESTION_TYPES)
    turns: list[QuestionTurn] = []
    num_tries = 0
    while len(turns) < num_turns and num_tries < 20 * num_turns:
        num_tries += 1
        name = rng.choice(names)
        if name == "caption" and any(turn.type == "caption" for turn in turns):
            continue
        new = QUESTION_TYPES[name](scene, rng)
        questions = {turn.question for turn in turns}
        if new and new[-1].question not in questions and new[0].question not in questions:
            turns += new
    return turns
