"""Questions in a person's own words: every kind has them, a fifth is never trained, and they ask the same."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from mmllm.scenes.absent import ABSENT
from mmllm.scenes.conversations import SceneConversation
from mmllm.scenes.pair_questions import ask_about_two
from mmllm.scenes.questions import QUESTION_TYPES, QuestionTurn
from mmllm.scenes.small_talk import SMALL_TALK
from mmllm.scenes.templates import HELD_OUT, INTENTS, UNKNOWN_QUESTIONS, UNKNOWN_THING_QUESTIONS, UNKNOWN_WORDS
from mmllm.scenes.wordings import (
    UNKNOWN,
    UNKNOWN_ANSWER,
    Wordings,
    ask_unknown,
    expand,
    plain_words,
    reword,
    split_templates,
)
from mmllm.scenes.world import COLORS, PLACES, SHAPES, SIZES, WORDS, sample_scene

TEMPLATES = (*(intent.templates for intent in INTENTS), UNKNOWN_QUESTIONS, UNKNOWN_THING_QUESTIONS)
PAIRS = [
    ("is the red star left of the blue circle?", "is the (.+) (left of|right of|above|below) the (.+)"),
    ("what shape is left of the red object?", "what shape is (left of|right of|above|below) the (.+)"),
    ("is the star small or large?", "what size is"),
    ("which picture has more objects?", "which picture has more objects"),
    ("which picture has a star?", "which picture has (.+)"),
    ("and the other one?", "and the other one"),
    ("and the red bar?", "and the (.+?)"),
    ("where is it?", "where is it"),
    ("where is the star?", "where (?:in the picture )?is the"),
    ("what color is it?", "what (color|shape) is it"),
    ("what color is the star at the top left?", "(?:what color is|what is the color of) the"),
    ("is there anything at the top left?", "is there anything"),
    ("is there an orange star?", "is there (an? .+)"),
    ("read the word.", "(?:what (word|number) is written"),
]


def asked() -> list[QuestionTurn]:
    rng = random.Random(0)
    turns: list[QuestionTurn] = []
    for _ in range(400):
        scene = sample_scene(rng, "val")
        for ask in QUESTION_TYPES.values():
            turns += ask(scene, rng)
        turns += ask_about_two(sample_scene(rng, "val", "objects"), sample_scene(rng, "val", "objects"), rng, 4)
    return turns


@pytest.mark.parametrize("held_out", [False, True])
def test_every_question_has_other_words_that_ask_for_the_same(held_out: bool) -> None:
    rng = random.Random(1)
    for turn in asked():
        raw = reword(turn.question, rng, held_out=held_out).lower()
        new = plain_words(raw)
        assert any(re.fullmatch(intent.pattern, turn.question) for intent in INTENTS), turn.question
        for word in (*COLORS, *SHAPES, "left", "right", "above", "below", "top", "bottom"):
            assert len(re.findall(rf"\b{word}", turn.question)) <= len(re.findall(rf"\b{word}", new)), (turn, new)
        assert not re.search(r"crosss|\ba [aeiou]|\ban [^aeiou]|[*\[\]{}|]|  ", raw), raw


@pytest.mark.parametrize(("question", "pattern"), PAIRS)
def test_a_question_is_matched_by_what_it_asks(question: str, pattern: str) -> None:
    first = next(intent for intent in INTENTS if re.fullmatch(intent.pattern, question))
    assert pattern in first.pattern


def test_a_fifth_of_the_templates_is_held_out() -> None:
    numbers = [0, 0]
    for templates in (*TEMPLATES, *UNKNOWN_WORDS.values()):
        assert len(set(templates)) == len(templates)
        trained, held_out = (split_templates(templates, held_out=flag) for flag in (False, True))
        assert {*trained, *(HELD_OUT + one for one in held_out)} == set(templates)
        assert not set(trained) & set(held_out)
        assert len(held_out) >= 1
        assert len(trained) >= 4
        if templates in TEMPLATES:
            numbers[0] += len(held_out)
            numbers[1] += len(templates)
    assert 0.15 < numbers[0] / numbers[1] < 0.25
    assert numbers[1] > 400


def test_dozens_of_wordings_for_each_of_the_common_questions() -> None:
    for question in ("what color is the star?", "where is the star?", "is there a star?", "how many stars are there?"):
        rng = random.Random(0)
        assert len({reword(question, rng, held_out=False).lower().strip("?. !") for _ in range(2000)}) > 200


def test_a_held_out_wording_is_no_trained_one_in_synonyms() -> None:
    """Else training would show it."""
    for templates in TEMPLATES:
        trained, held_out = (
            {plain_words(text) for one in split_templates(templates, held_out=flag) for text in expand(one)}
            for flag in (False, True)
        )
        assert not trained & held_out
    every = [
        text
        for intent in INTENTS
        for text in {plain_words(text) for one in intent.templates for text in expand(one.removeprefix(HELD_OUT))}
    ]
    # what fills the place tells these apart: a bar, a word, the red object
    allowed = {"which {0} is it?", "the {0}?", "and the {0}?", "what is the {0}?"}
    assert {text for text, count in Counter(every).items() if count > 1} <= allowed


def test_a_held_out_wording_has_no_word_that_training_never_shows() -> None:
    """It judges whether a new sentence is understood; a word that was never seen can only be guessed."""
    trained, held_out = (
        {
            word
            for intent in INTENTS
            for template in split_templates(intent.templates, held_out=flag)
            for text in expand(template)
            for word in re.findall(r"\w+", text)
        }
        for flag in (False, True)
    )
    assert held_out - trained <= {"hi", "now"}  # which stand before trained questions


def test_what_is_not_in_the_world_is_none_of_its_words() -> None:
    world = {*COLORS, *SHAPES, *SIZES, *WORDS, *" ".join(PLACES).split(), "bar", "picture", "number", "word", "object"}
    assert not world & {word.removeprefix(HELD_OUT) for words in UNKNOWN_WORDS.values() for word in words}


def test_sums_and_sides_stay_as_they_are_and_the_unknown_has_one_answer() -> None:
    rng = random.Random(2)
    assert reword("is a circle round?", rng, held_out=False) == "is a circle round?"
    assert reword("who are you?", rng, held_out=False) != "who are you?"
    for held_out in (False, True):
        asked = [ask_unknown(rng, held_out=held_out) for _ in range(400)]
        assert {answer for _, answer in asked} == {UNKNOWN_ANSWER}
        assert len({question for question, _ in asked}) > 360
        assert not [question for question, _ in asked if re.search(r"[\[\]{}|]|  ", question)]


def test_the_unknown_and_small_talk_stand_anywhere_but_before_a_follow_up() -> None:
    rng = random.Random(4)
    places: Counter[int] = Counter()
    follow = QuestionTurn("follow_up", "and the other one?", "red", 1)
    turns = (*[QuestionTurn("color", "what color is the star?", "blue"), follow] * 4,)
    for _ in range(200):
        new = Wordings(0.5).apply(SceneConversation((), turns), rng).turns
        kept = [turn for turn in new if turn.type in ("color", "follow_up")]
        assert [turn.answer for turn in kept] == [turn.answer for turn in turns]
        for number, turn in enumerate(new):
            assert not turn.num_needed or new[number - 1].type == "color"
            places[number] += turn.type == UNKNOWN
            small_talk = turn.type == "text_only"
            assert not small_talk or turn.answer in [answer for _, answer in SMALL_TALK]
    assert min(places[number] for number in (0, 2, 4, 6, 8)) > 10
    assert Wordings(0.0).apply(SceneConversation((), turns), rng).turns == turns


def test_only_a_single_picture_is_asked_about_what_it_does_not_show() -> None:
    rng = random.Random(6)
    scene = sample_scene(rng, "val", "objects")
    turns = tuple(QuestionTurn("color", "what color is the star?", "blue") for _ in range(8))
    for scenes in ((), (scene,), (scene, scene)):
        new = [turn for _ in range(100) for turn in Wordings(1.0).apply(SceneConversation(scenes, turns), rng).turns]
        absent = [turn for turn in new if turn.type == ABSENT]
        assert len(absent) > 30 if len(scenes) == 1 else not absent
        assert all(turn.answer.startswith("there is no ") and turn.plain for turn in absent)
        greetings = {turn.answer for turn in new if turn.answer.startswith("hello!")}
        assert greetings == {"hello! ask me about the picture." if scenes else "hello! show me a picture."}


def test_without_small_talk_all_that_is_unknown_is_about_a_thing() -> None:
    rng = random.Random(5)
    turns = tuple(QuestionTurn("color", "what color is the star?", "blue") for _ in range(8))
    added = [
        turn
        for _ in range(200)
        for turn in Wordings(0.5, small_talk=False).apply(SceneConversation((), turns), rng).turns
        if turn.type != "color"
    ]
    assert len(added) > 100
    assert {(turn.type, turn.answer) for turn in added} == {(UNKNOWN, UNKNOWN_ANSWER)}
    assert not [
        turn.question for turn in added if re.search(r"weather|joke|capital of|who painted|meaning", turn.question)
    ]
    assert repr(Wordings(0.5, small_talk=False)) == repr(Wordings(0.5)), "it seeds the words of pictures"


def test_words_come_with_and_without_capitals_and_question_marks_and_in_british_spelling() -> None:
    rng = random.Random(3)
    texts = [reword("what color is the large star at the top left?", rng, held_out=False) for _ in range(300)]
    for has in ("colour", "color", "big", "large", "please"):
        assert any(has in text.lower() for text in texts)
    assert 0.3 < sum(text[0].isupper() for text in texts) / 300 < 0.7
    assert 0.1 < sum(text[-1] not in "?." for text in texts) / 300 < 0.5
    assert not [text for text in texts if re.search(r"\ba [aeiou]|  ", text)]
