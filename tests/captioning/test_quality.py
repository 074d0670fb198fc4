"""The rules that flag a caption: each on captions that it must find, and on ordinary ones that it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmllm.captioning.prompts import PromptTemplate
from mmllm.captioning.quality import FLAGS, check_script, flags_of
from mmllm.errors import MmllmError
from mmllm.readers.files import RowError

PROMPT = "Describe the picture."
FINE = (
    "a red circle left of a blue circle. a red circle above a green circle.",
    "A very, very, very old house by the sea; no, no, no people.",
    "the number 79 in orange. the word moon in purple.",
    "Two dogs and two cats and two birds and two fish and two more dogs.",
    "I see a sorry sight: a broken chair that cannot stand.",
    "A sign that says STOP STOP STOP.",
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "The thinking man, a statue by Rodin, in Paris (Musée Rodin).",
    "A menu in Japanese: 寿司 and 刺身.",
    "ha ha ha",
    "a bill of 10000000000000 marks ----------------",
)
WRONG = {
    "empty": ("", "  \n", "-----------"),
    "repetition": (
        "a cat and a dog and " + "a dog and " * 5,
        "blue blue blue blue blue blue blue blue blue",
        "There is a man on a horse. " * 3,
        "AHAHAHAHAHAHAHAHAHAHAHAHAH",
        "啊" * 30,
    ),
    "refusal": (
        "I'm sorry, but I can't help with that.",
        "I’m unable to see the image.",
        "As an AI, I do not see pictures.",
        "Unfortunately, I cannot describe people.",
        "I cannot view images.",
    ),
    "echo": ("Describe the picture. A dog.", "describe the picture"),
    "think": ("<think>The user wants</think> A dog.", "A dog </think>", "<|channel|>analysis a dog"),
    "script": ("一只狗坐在草地上", "собака на траве", "A dog 一只狗坐在草地上"),
}


@pytest.mark.parametrize("caption", FINE)
def test_an_ordinary_caption_has_no_flag(caption: str) -> None:
    assert flags_of(caption, PROMPT, is_cut=False) == []


@pytest.mark.parametrize(("flag", "caption"), [(flag, text) for flag, texts in WRONG.items() for text in texts])
def test_a_wrong_caption_has_its_flag(flag: str, caption: str) -> None:
    assert flag in flags_of(caption, PROMPT, is_cut=False)
    assert "cut" in flags_of(caption, PROMPT, is_cut=True)


def test_every_flag_has_captions_that_it_finds() -> None:
    assert {*WRONG, "cut"} == set(FLAGS)


def test_the_captions_of_the_embedded_world_have_no_flag(tiny_scenes: Path) -> None:
    rows = json.loads((tiny_scenes / "train" / "captions.json").read_text())
    texts = [row["conversations"][1]["value"] for row in rows]
    assert len(texts) >= 24
    assert [text for text in texts if flags_of(text, PROMPT, is_cut=False)] == []


def test_the_script_that_is_wanted_is_the_prompts_or_a_named_one() -> None:
    assert "script" not in flags_of("一只狗坐在草地上", "描述这张图片", is_cut=False)
    assert "script" in flags_of("A dog sits on the grass", "描述这张图片", is_cut=False)
    assert "script" not in flags_of("犬は草の上に座っています", "カタカナで", is_cut=False)
    assert "script" not in flags_of("一只狗坐在草地上", PROMPT, is_cut=False, script="han")
    assert "script" not in flags_of("一只狗坐在草地上", PROMPT, is_cut=False, script="any")
    assert "script" not in flags_of("42!", "7?", is_cut=False)
    with pytest.raises(MmllmError, match="--script elvish is not known; allowed: auto, any, latin"):
        check_script("elvish")


def test_a_long_caption_is_checked_quickly() -> None:
    assert flags_of("word %d " * 2000 % tuple(range(2000)), PROMPT, is_cut=False) == []
    assert flags_of("ab" * 3 + "x" * 8 + "yz" * 4000, PROMPT, is_cut=False) == ["repetition"]


def test_a_prompt_names_fields_and_keeps_other_braces() -> None:
    template = PromptTemplate('Is {name} of {folder} as {{"a": {1}}}?')
    assert template.fill("x/birds/robin.png", "", {}) == 'Is robin of birds as {{"a": {1}}}?'
    with pytest.raises(MmllmError, match=r"the prompt has the field \{colour\}.*allowed: \{name\}"):
        PromptTemplate("{colour}").check(has_list=False)
    PromptTemplate("{colour}").check(has_list=True)
    assert PromptTemplate("{colour} {name}").fill("a.png", "", {"colour": "red", "name": 7}) == "red 7"
    with pytest.raises(RowError, match="has no colour"):
        PromptTemplate("{colour}").fill("a.png", "", {})
    with pytest.raises(MmllmError, match="the prompt is empty"):
        PromptTemplate("  ")
