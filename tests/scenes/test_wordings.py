"""Questions in a person's own words: every kind has them, a fifth is never trained, and they ask the same."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from mmllm.scenes.pair_questions import ask_about_two
from mmllm.scenes.questions import QUESTION_TYPES, QuestionTurn
from mmllm.scenes.wordings import INTENTS, UNKNOWN_QUESTIONS, ask_unknown, plain_words, reword, split_templates
from mmllm.scenes.world import COLORS, SHAPES, sample_scene

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
        new = reword(turn.question, rng, held_out=held_out).lower()
        assert any(re.fullmatch(intent.pattern, turn.question) for intent in INTENTS), turn.question
        for word in (*COLORS, *SHAPES, "left", "right", "above", "below", "top", "bottom"):
            assert len(re.findall(rf"\b{word}", turn.question)) <= len(re.findall(rf"\b{word}", new)), (turn, new)


@pytest.mark.parametrize(("question", "pattern"), PAIRS)
def test_a_question_is_matched_by_what_it_asks(question: str, pattern: str) -> None:
    first = next(intent for intent in INTENTS if re.fullmatch(intent.pattern, question))
    assert pattern in first.pattern


def test_a_fifth_of_the_templates_is_held_out() -> None:
    numbers = [0, 0]
    for templates in (*(intent.templates for intent in INTENTS), UNKNOWN_QUESTIONS):
        assert len(set(templates)) == len(templates)
        trained, held_out = (split_templates(templates, held_out=flag) for flag in (False, True))
        assert set(trained) | set(held_out) == set(templates)
        assert not set(trained) & set(held_out)
        assert len(held_out) >= 1
        assert len(trained) >= 4
        numbers[0] += len(held_out)
        numbers[1] += len(templates)
    assert 0.15 < numbers[0] / numbers[1] < 0.25
    assert numbers[1] > 250


def test_no_template_is_another_one_in_synonyms() -> None:
    """Else a held-out wording would be one that training shows."""
    every = [plain_words(text) for intent in INTENTS for text in intent.templates] + list(UNKNOWN_QUESTIONS)
    assert [text for text, count in Counter(every).items() if count > 1] == []
    have_answers = [text for text in UNKNOWN_QUESTIONS if re.match(r"(is there|do you see|are there) ", text)]
    assert have_answers == []


def test_small_talk_stays_as_it_is_and_the_unknown_has_one_answer() -> None:
    rng = random.Random(2)
    assert reword("who are you?", rng, held_out=False) == "who are you?"
    assert len({ask_unknown(rng, held_out=False)[1] for _ in range(50)}) == 1
    assert len({ask_unknown(rng, held_out=False)[0] for _ in range(50)}) > 20


def test_words_come_with_and_without_capitals_and_question_marks_and_in_british_spelling() -> None:
    rng = random.Random(3)
    texts = [reword("what color is the large star?", rng, held_out=False) for _ in range(300)]
    for has in ("colour", "color", "big", "large", "please"):
        assert any(has in text.lower() for text in texts)
    assert 0.3 < sum(text[0].isupper() for text in texts) / 300 < 0.7
    assert 0.1 < sum(text[-1] not in "?." for text in texts) / 300 < 0.5
