"""Every question has the one answer that is given: each is answered again by `scene_answers`, from its words alone."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from mmllm.evaluation.run import f1
from mmllm.scenes.absent import ABSENT, ask_absent
from mmllm.scenes.captions import (
    BAR_WORDINGS,
    LINE_WORDINGS,
    THING_WORDINGS,
    fact_counts,
    facts_in,
    facts_of,
    write_caption,
)
from mmllm.scenes.conversations import about_one, about_two, retelling, sample_twin, text_example
from mmllm.scenes.pair_questions import TWO_PICTURES, ask_about_two
from mmllm.scenes.questions import (
    CAPTION_REQUESTS,
    QUESTION_TYPES,
    QuestionTurn,
    ask_about,
    references,
)
from mmllm.scenes.small_talk import NO_PICTURE, SMALL_TALK, ask_without_picture
from mmllm.scenes.world import COLORS, SHAPES, Bar, Line, Scene, Thing, sample_any_scene, sample_scene
from tests.builders.scene_answers import UnanswerableError, answer, read_caption, the

KINDS = ("objects", "objects", "objects", "text", "chart")
WRONG_ARTICLE = re.compile(r"\ba [aeiou]|\ban [^aeiou]")
TWO_CIRCLES = Scene(
    "objects",
    things=(
        Thing("circle", "red", "small", "top left"),
        Thing("circle", "blue", "small", "top right"),
        Thing("star", "red", "large", "bottom left"),
    ),
)


def check(scenes: tuple[Scene, ...], turns: list[QuestionTurn]) -> None:
    """Every turn, read with just the turns that it needs, has its answer and no other."""
    for number, turn in enumerate(turns):
        assert turn.num_needed <= number
        assert turn.question == turn.question.lower()
        assert not WRONG_ARTICLE.search(turn.question), turn.question
        if turn.type == "caption":
            assert turn.question in CAPTION_REQUESTS
            assert read_caption(turn.answer) == scenes[0]
            continue
        questions = [one.question for one in turns[number - turn.num_needed : number + 1]]
        assert answer(scenes, questions) == turn.answer, f"{questions} about {scenes}"


@pytest.mark.parametrize("name", [name for name in QUESTION_TYPES if name != "caption"])
def test_every_answer_follows_from_the_scene(name):
    rng = random.Random(name)
    num_asked = 0
    for number in range(1500):
        scene = sample_any_scene(rng, KINDS[number % len(KINDS)])
        turns = QUESTION_TYPES[name](scene, rng)
        check((scene,), turns)
        num_asked += bool(turns)
        if turns:
            assert turns[-1].type == name
    assert num_asked > 150


@pytest.mark.parametrize("name", [name for name in QUESTION_TYPES if name != "caption"])
def test_no_scene_makes_an_asker_fail(name):
    """Scenes at the edge: one thing, all things alike, all places taken, all bars alike."""
    alike = tuple(Thing("heart", "black", "small", place) for place in ("top left", "top right", "center"))
    full = tuple(
        Thing("cross", "red", "large", p) for p in ("top left", "top right", "center", "bottom left", "bottom right")
    )
    edges = (
        Scene("objects", things=alike[:1]),
        Scene("objects", things=alike),
        Scene("objects", things=full),
        Scene("chart", bars=(Bar("red", 3), Bar("blue", 3))),
        Scene("text", lines=(Line("number", "0", "orange"),)),
    )
    for seed in range(100):
        for scene in edges:
            check((scene,), QUESTION_TYPES[name](scene, random.Random(seed)))


def test_a_conversation_reads_as_one_and_asks_nothing_twice():
    rng = random.Random(0)
    types: Counter[str] = Counter()
    for _ in range(200):
        scene = sample_any_scene(rng)
        turns = ask_about(scene, rng, 10)
        check((scene,), turns)
        types.update(turn.type for turn in turns)
        questions = [turn.question for turn in turns if turn.type != "follow_up"]
        assert len(set(questions)) == len(questions)
        assert sum(turn.type == "caption" for turn in turns) <= 1
    assert set(types) == set(QUESTION_TYPES)


def test_only_the_types_that_are_wanted_are_asked():
    rng = random.Random(0)
    for _ in range(20):
        turns = ask_about(sample_any_scene(rng, "objects"), rng, 5, ["color", "count"])
        assert {turn.type for turn in turns} <= {"color", "count"}


@pytest.mark.parametrize("name", ["exists", "relation", "compare"])
def test_yes_and_no_are_asked_equally_often(name):
    rng = random.Random(0)
    answers: Counter[str] = Counter()
    for _ in range(1200):
        answers.update(turn.answer for turn in ask_about(sample_any_scene(rng), rng, 4, [name]))
    assert 0.45 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.55


def test_a_no_is_a_near_miss_where_there_is_one():
    rng = random.Random(0)
    num_seen = 0
    for _ in range(600):
        scene = sample_any_scene(rng, "objects")
        colors, shapes = {t.color for t in scene.things}, {t.shape for t in scene.things}
        has_near_miss = len({(t.color, t.shape) for t in scene.things}) < len(colors) * len(shapes)
        for turn in QUESTION_TYPES["exists"](scene, rng):
            words = turn.question.removesuffix("?").split()
            if (
                turn.answer == "no"
                and has_near_miss
                and len(words) == 5
                and words[-1] != "object"
                and "anything" not in words
            ):
                assert words[3] in colors
                assert words[4] in shapes
                num_seen += 1
    assert num_seen > 40


def test_every_reference_names_its_thing_alone():
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_any_scene(rng, "objects")
        for thing in scene.things:
            hidden = rng.sample(("color", "shape", "size", "place"), rng.randint(0, 2))
            for words in references(scene, thing, hidden):
                assert the(scene, words) == thing
                assert not any(getattr(thing, name) in words for name in hidden), f"{words!r} gives {hidden} away"


def test_the_checker_refuses_what_is_ambiguous():
    for question in ("what color is the circle?", "what size is the red object?", "what color is the heart?", "why?"):
        with pytest.raises(UnanswerableError):
            answer((TWO_CIRCLES,), [question])
    with pytest.raises(UnanswerableError, match="no rule"):
        answer((TWO_CIRCLES,), ["and the other one?"])
    assert answer((TWO_CIRCLES,), ["what color is the circle at the top left?", "and the other one?"]) == "blue"
    assert answer((TWO_CIRCLES,), ["is the star below the blue circle?"]) == "yes"
    assert answer((TWO_CIRCLES,), ["how many circles are there?"]) == "2"


def test_questions_about_two_pictures_have_one_answer_and_there_is_always_one():
    rng = random.Random(0)
    types: Counter[str] = Counter()
    for _ in range(600):
        first = sample_any_scene(rng, "objects")
        second = sample_twin(first, rng, "train")
        turns = ask_about_two(first, second, rng, 4)
        check((first, second), turns)
        assert 1 <= len(turns) <= 4, "a pair that nothing is asked about is no conversation"
        assert {turn.type for turn in turns} == {TWO_PICTURES}
        types.update(" ".join(turn.question.split()[:4]) for turn in turns)
        types.update(turn.answer for turn in turns if "same" in turn.question)
    assert types["are the two pictures"] > 100
    assert types["which picture has more"] > 100
    assert 0.25 < types["same"] / types["are the two pictures"] < 0.5


def test_turns_without_picture_are_small_talk_numbers_or_a_plain_no():
    rng = random.Random(0)
    talk, seen = dict(SMALL_TALK), Counter()
    for _ in range(150):
        for turn in ask_without_picture(rng, sample_any_scene(rng), 5):
            if found := re.fullmatch(r"which is more, (\d+) or (\d+)\?", turn.question):
                assert turn.answer == str(max(int(found[1]), int(found[2])))
            elif found := re.fullmatch(r"what number comes after (\d)\?", turn.question):
                assert turn.answer == str(int(found[1]) + 1)
            else:
                assert turn.answer == talk.get(turn.question, NO_PICTURE)
            seen[turn.answer == NO_PICTURE] += 1
            assert turn.num_needed == 0
    assert seen[True] > 50
    assert seen[False] > 200


def test_what_is_absent_is_asked_for_as_if_it_were_there_and_said_not_to_be():
    rng = random.Random(0)
    asked: Counter[str] = Counter()
    for number in range(1500):
        scene = sample_any_scene(rng, KINDS[number % len(KINDS)])
        turn = ask_absent(scene, rng)
        with pytest.raises(UnanswerableError, match="fits 0 things"):
            answer((scene,), [turn.question])
        noun = re.fullmatch(r"there is no (.+)\.", turn.answer)[1]
        assert f"the {noun}" in turn.question or f"{noun} is written" in turn.question
        color = noun.split()[0]
        if color in COLORS and noun.split()[-1] in SHAPES:
            shapes = {thing.shape for thing in scene.things}
            assert noun.split()[1] not in shapes or color not in {part.color for part in scene.parts}
        asked[noun.split()[-1] if color in COLORS else "line" if noun in ("word", "number") else "alone"] += 1
        assert turn.type == ABSENT
        assert turn.num_needed == 0
    assert asked["alone"] > 200
    assert min(asked[name] for name in ("line", "bar", "object", *SHAPES)) > 15


def test_a_description_in_the_place_of_a_picture_tells_the_same_scene():
    rng = random.Random(0)
    for _ in range(60):
        scene = sample_scene(rng, "train")
        talk = about_one(scene, rng, 4)
        example = text_example(talk, rng, "1")
        description, question = example.messages[0].text.split("\n")
        assert read_caption(description) == scene
        assert question == talk.turns[0].question
        assert [message.text for message in example.messages[1::2]] == [turn.answer for turn in talk.turns]
    first = sample_scene(rng, "train", "objects")
    second = sample_twin(first, rng, "train")
    opening = text_example(about_two(first, second, rng, 3), rng, "2").messages[0].text.split("\n")
    assert [read_caption(line.removeprefix(f"Picture {n}: ")) for n, line in enumerate(opening[:2], 1)] == [
        first,
        second,
    ]


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_wording_tells_all_of_the_scene_and_nothing_else(shuffled):
    rng = random.Random(0)
    for _ in range(400):
        scene = sample_any_scene(rng)
        caption = write_caption(scene, rng, shuffled=shuffled)
        assert facts_in(caption) == facts_of(scene)
        assert read_caption(caption) == scene
        assert not WRONG_ARTICLE.search(caption), caption


def test_each_wording_is_read_for_itself():
    thing, line, bar = Thing("star", "orange", "large", "center"), Line("word", "sun", "red"), Bar("black", 4)
    told = [(wording(thing) + ".", Scene("objects", things=(thing,))) for wording in THING_WORDINGS]
    told += [(wording(line) + ".", Scene("text", lines=(line,))) for wording in LINE_WORDINGS]
    told += [(f"a bar chart: {wording(bar)}.", Scene("chart", bars=(bar,))) for wording in BAR_WORDINGS]
    for caption, scene in told:
        assert fact_counts(caption, scene) == (len(facts_of(scene)),) * 3, caption


def test_retelling_says_the_same_in_other_words():
    rng = random.Random(0)
    scene = sample_any_scene(rng, "objects")
    turns = retelling(scene, rng, 4).turns
    assert all(facts_in(turn.answer) == facts_of(scene) for turn in turns)


@pytest.mark.parametrize(
    ("caption", "counts"),
    [
        ("a small red circle at the top left. a large blue star in the center.", (6, 6, 6)),
        ("a small red circle at the top left.", (3, 3, 6)),
        ("a small red circle at the top left. a large green star in the center.", (5, 6, 6)),
        ("a small red circle at the top right. a large blue star in the center.", (3, 6, 6)),
        ("Top left: Small red circle.", (3, 3, 6)),
        ("a bar chart: red 3.", (0, 1, 6)),
        ("the word sun in red.", (0, 2, 6)),
        ("a red circle", (0, 0, 6)),
        ("", (0, 0, 6)),
        ("a small red circle at the top left. a small red circle at the top left.", (3, 3, 6)),
        ("a small large red circle at the top left.", (2, 2, 6)),
    ],
)
def test_facts_are_counted_by_hand(caption, counts):
    scene = Scene(
        "objects", things=(Thing("circle", "red", "small", "top left"), Thing("star", "blue", "large", "center"))
    )
    assert fact_counts(caption, scene) == counts


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    assert f1(6, 6, 6) == 1.0
    assert f1(3, 3, 6) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert f1(0, 4, 6) == 0.0
    assert f1(0, 0, 0) == 0.0
