"""The same questions in a person's own words: other verbs and word order, politeness, synonyms, British spelling.

A question is matched by what it asks, put into another template, and decorated. A fifth of the templates are held out:
training never shows them, and the split `wordings` asks in nothing else, but for small talk and numbers.
"""

from __future__ import annotations

import functools
import random
import re
import zlib
from dataclasses import dataclass

_HELD_OUT_FIFTH = 5


@dataclass(frozen=True)
class Intent:
    """What a question asks: a pattern of `questions.py`, and templates whose `{0}`, `{1}` are the pattern's groups."""

    pattern: str
    templates: tuple[str, ...]


_ONE = "the (.+?)"
INTENTS: tuple[Intent, ...] = (
    # two pictures
    Intent(r"are the two pictures the same or different\?", (
        "are these pictures the same or different?",
        "same picture or different?", "do both pictures show the same thing or something different?",
        "tell me if the pictures are the same or different.",
        "compare the two pictures: same or different?", "are the pictures identical or different?",
    )),
    Intent(r"which picture has more objects\?", (
        "which of the pictures has more objects?", "in which picture are there more objects?",
        "where are more objects, in picture 1 or picture 2?", "which picture shows more objects?",
        "tell me which picture has more objects.", "does picture 1 or picture 2 have more objects?",
        "which one of the pictures has the most objects?",
    )),
    Intent(r"which picture has (.+)\?", (
        "which picture shows {0}?", "in which picture is there {0}?", "which of the pictures has {0}?",
        "where do you see {0}, in picture 1 or picture 2?", "in which picture do you see {0}?",
        "tell me which picture has {0}.", "which picture contains {0}?", "show me the picture with {0}.",
        "which one has {0}?",
    )),
    # comparisons
    Intent(r"are the (.+) and the (.+) the same (color|shape|size)\?", (
        "do the {0} and the {1} have the same {2}?", "is the {2} of the {0} the same as the {2} of the {1}?",
        "does the {0} have the same {2} as the {1}?", "have the {0} and the {1} got the same {2}?",
        "is the {2} of the {0} and the {1} the same?", "are the {0} and the {1} equal in {2}?",
        "do the {0} and the {1} share the same {2}?",
    )),
    Intent(r"which is (larger|smaller), the (.+) or the (.+)\?", (
        "what is {0}, the {1} or the {2}?", "which one is {0}, the {1} or the {2}?",
        "of the {1} and the {2}, which is {0}?", "tell me which is {0}, the {1} or the {2}.",
        "which of the two is {0}, the {1} or the {2}?", "is the {1} or the {2} {0}?",
        "between the {1} and the {2}, which one is {0}?",
    )),
    Intent(r"are there more (.+) than (.+)\?", (
        "do you see more {0} than {1}?", "is the number of {0} higher than the number of {1}?",
        "can you see more {0} than {1}?", "does the picture have more {0} than {1}?",
        "are the {0} more than the {1}?", "does the picture show more {0} than {1}?",
        "do the {0} outnumber the {1}?",
    )),
    Intent(r"is the (.+) bar (taller|shorter) than the (.+) bar\?", (
        "does the {0} bar look {1} than the {2} bar?", "is the bar in {0} {1} than the bar in {2}?",
        "compared to the {2} bar, is the {0} bar {1}?", "tell me if the {0} bar is {1} than the {2} bar.",
        "is the {0} one {1} than the {2} one?", "would you say the {0} bar is {1} than the {2} bar?",
        "is {0} {1} than {2}?",
    )),
    # places
    Intent(r"what shape is (left of|right of|above|below) the (.+)\?", (
        "which shape is {0} the {1}?", "what is the shape {0} the {1}?", "which shape do you see {0} the {1}?",
        "what shape do you find {0} the {1}?", "tell me the shape {0} the {1}.", "{0} the {1}, what shape is there?",
        "name the shape {0} the {1}.",
    )),
    Intent(r"is the (.+) (left of|right of|above|below) the (.+)\?", (
        "do you find the {0} {1} the {2}?", "does the {0} lie {1} the {2}?", "do you see the {0} {1} the {2}?",
        "tell me if the {0} is {1} the {2}.", "is it true that the {0} is {1} the {2}?",
        "is the {0} placed {1} the {2}?",         "would you say the {0} is {1} the {2}?",
        "is the {0} located {1} the {2}?", "the {0} is {1} the {2}, right?",
    )),
    Intent(rf"where (?:in the picture )?is {_ONE}\?", (
        "where can i find the {0}?", "tell me where the {0} is.", "in which place is the {0}?",
        "where do you see the {0}?", "what is the position of the {0}?", "in what part of the picture is the {0}?",
        "where is the {0} located?", "whereabouts is the {0}?", "where did they draw the {0}?",
        "show me where the {0} is.", "which place does the {0} have?",
    )),
    # charts
    Intent(r"(?:what is the value of|how tall is) the (.+) bar\?", (
        "what value does the {0} bar have?", "how high is the {0} bar?", "which value has the {0} bar?",
        "tell me the value of the {0} bar.", "what number does the {0} bar show?", "how much is the {0} bar?",
        "what is the height of the {0} bar?", "read the {0} bar.", "what's the {0} bar's value?",
        "how big is the {0} bar's value?",
    )),
    Intent(r"which bar has the value (\d+)\?", (
        "what bar has the value {0}?", "which bar shows {0}?", "which color has the bar with the value {0}?",
        "which bar is at {0}?", "tell me which bar has the value {0}.", "what color is the bar with value {0}?",
        "which of the bars has a value of {0}?",
    )),
    Intent(r"which bar is the (tallest|shortest)\?", (
        "what is the {0} bar?", "which of the bars is the {0}?", "what color is the {0} bar?",
        "tell me which bar is the {0}.", "name the {0} bar.", "which color has the {0} bar?", "what's the {0} bar?",
        "which is the {0} bar of all?", "which one is the {0} bar?",
    )),
    # written text
    Intent(r"(?:what (word|number) is written\?|read the (word|number)\.)", (
        "which {0} is written?",  "which {0} do you see?", "tell me the {0}.",
        "what {0} do you see?", "what {0} can you read?",  "what {0} does the picture show?",
        "please read me the {0}.", "what does the {0} say?", "what {0} stands there?",
    )),
    Intent(r"what does it say\?", (
        "what is written?", "what does the picture say?", "what is written in the picture?", "what do you read?",
        "can you read it?", "read it.", "tell me what is written.", "what does the text say?", "what can you read?",
    )),
    # attributes
    Intent(r"what (color|shape) is it\?", (
        "which {0} is it?", "which {0} does it have?", "what {0} does it have?", "and its {0}?",
        "what is its {0}?", "tell me its {0}.", "its {0}?", "what's the {0} of it?",
    )),
    Intent(r"what size is it\?", (
        "how large is it?", "is it large or small?", "what is its size?", "is it small or large?",
        "tell me its size.", "which size does it have?",
    )),
    Intent(r"where is it\?", (
        "where can i find it?", "what is its place?", "where do you see it?", "tell me where it is.",
        "in which place is it?", "where is it located?", "and where is it?",
    )),
    Intent(rf"(?:what color is|what is the color of) {_ONE}\?", (
        "which color does the {0} have?", "which color is the {0}?", "tell me the color of the {0}.",
        "what color does the {0} have?", "what's the color of the {0}?", "the {0} has which color?",
        "name the color of the {0}.", "in what color is the {0}?", "what color do you see on the {0}?",
        "how is the {0} colored?", "can you name the color of the {0}?", "which color has the {0}?",
    )),
    Intent(rf"(?:what shape is|what is the shape of) {_ONE}\?", (
        "which shape does the {0} have?", "which shape is the {0}?", "tell me the shape of the {0}.",
        "what shape does the {0} have?", "what's the shape of the {0}?", "what kind of shape is the {0}?",
        "name the shape of the {0}.", "what form does the {0} have?", "what is the {0}?", "which shape has the {0}?",
        "describe the shape of the {0}.",
    )),
    Intent(r"(?:what size is the (.+?)\?|is the (.+) small or large\?)", (
        "how large is the {0}?", "is the {0} large or small?", "tell me the size of the {0}.",
        "what is the size of the {0}?", "which size does the {0} have?",
        "what size does the {0} have?", "is it a small or a large one, the {0}?", "is the {0} large, or is it small?",
        "does the {0} look large or small?",
    )),
    # counting and presence
    Intent(r"how many (.+) are there\?", (
        "how many {0} do you see?", "how many {0} can you see?", "what is the number of {0}?", "count the {0}.",
        "how many {0} are in the picture?", "how many {0} does the picture show?", "tell me how many {0} there are.",
        "how many {0} can be seen?", "can you count the {0}?", "give me the number of {0}.", "how many {0}?",
        "how many {0} has the picture?",
    )),
    Intent(r"is there anything (.+)\?", (
        "do you see anything {0}?", "can you see anything {0}?", "is something {0}?", "is there something {0}?",
        "does the picture have anything {0}?", "is there an object {0}?", "can you find anything {0}?",
        "is anything {0}?",
    )),
    Intent(r"is there (an? .+)\?", (
        "do you see {0}?", "can you see {0}?", "does the picture have {0}?", "is {0} in the picture?",
        "does the picture show {0}?", "can you find {0}?", "is there {0} in the picture?", "tell me if there is {0}.",
        "are you able to see {0}?", "have they drawn {0}?", "does it contain {0}?",
    )),
    # follow-ups
    Intent(r"and the other one\?", (
        "what about the other one?", "and the other?", "how about the other one?", "and what about the other one?",
        "the other one?", "and for the other one?",
    )),
    Intent(rf"and {_ONE}\?", (
        "what about the {0}?", "how about the {0}?", "and what about the {0}?", "now the {0}?", "and for the {0}?",
        "the {0}?", "and how about the {0}?",
    )),
    # captions
    Intent(r"(?:describe the picture\.|what is in the picture\?|what do you see\?|write a caption\.)", (
        "what does the picture show?", "tell me what you see.", "what can you see?", "describe what you see.",
        "give me a caption.", "write a description of the picture.", "what is shown in the picture?",
        "tell me about the picture.", "describe it.", "caption this picture.", "what is this a picture of?",
        "can you describe the picture?", "please say what is in the picture.", "what is this?",
    )),
)  # fmt: skip
_FRAMES = (
    "{}", "{}", "{}", "{}", "please, {}", "{} please", "hello, {}", "hey, {}", "look at the picture: {}", "so, {}",
    "ok, {}", "one question: {}", "i want to know: {}", "can you tell me: {}", "well, {}", "tell me, {}", "now, {}",
)  # fmt: skip
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "picture": ("image", "photo"), "pictures": ("images", "photos"), "color": ("colour",), "colored": ("coloured",),
    "object": ("thing", "item"), "objects": ("things", "items", "shapes"), "large": ("big",), "larger": ("bigger",),
    "small": ("little",), "center": ("middle", "centre"),
}  # fmt: skip
_PLAIN = {synonym: word for word, synonyms in _SYNONYMS.items() for synonym in synonyms}
UNKNOWN = "unknown"
UNKNOWN_ANSWER = "i can tell you about shapes, colors, sizes, places, words and bars."
UNKNOWN_QUESTIONS = (
    "who painted this?", "what is the weather?", "how old is this picture?", "what is your favorite color?",
    "who is the president?", "where was this picture taken?", "what time is it?", "how much does it cost?",
    "is it raining?", "who are the people in the picture?", "what is the capital of france?",
    "what happens next?", "why is it there?", "who made you?", "can you write a poem?", "what is the brand of the car?",
    "how heavy is it?", "what does it smell like?",
    "what is the man doing?", "which country is this?", "what language is this?", "who won the game?",
    "what should i eat today?", "how do i get to the station?", "is this art any good?", "what season is it?",
    "translate this into german.", "sing a song.", "what is the meaning of life?", "how far away is it?",
    "is the woman smiling?", "what kind of animal is it?", "what year is it?", "do you like it?",
    "can you draw something?", "what material is it made of?",
)  # fmt: skip


def plain_words(text: str) -> str:
    """The text with each synonym replaced by the word that it stands for."""
    return re.sub(r"\w+", lambda word: _PLAIN.get(word[0], word[0]), text)


@functools.cache
def split_templates(templates: tuple[str, ...], *, held_out: bool) -> tuple[str, ...]:
    """A fifth of the templates, at least one, which training never shows; or the others. Their texts alone decide."""
    by_hash = tuple(sorted(templates, key=lambda template: zlib.crc32(template.encode())))
    num_held_out = max(1, round(len(templates) / _HELD_OUT_FIFTH))
    return by_hash[:num_held_out] if held_out else by_hash[num_held_out:]


def reword(question: str, rng: random.Random, *, held_out: bool) -> str:
    """The question in other words, from held-out templates or from the others; small talk stays as it is."""
    for intent in INTENTS:
        if match := re.fullmatch(intent.pattern, question):
            templates = split_templates(intent.templates, held_out=held_out)
            values = [value for value in match.groups() if value is not None]
            return _decorate(rng.choice(templates).format(*values), rng)
    return question


def ask_unknown(rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """A question that no picture of this world answers, and the one honest answer."""
    question = rng.choice(split_templates(UNKNOWN_QUESTIONS, held_out=held_out))
    return _decorate(question, rng), UNKNOWN_ANSWER


def _decorate(question: str, rng: random.Random) -> str:
    """Politeness, synonyms, capitals, and a question mark that is there or not."""
    words = [
        rng.choice((word, *_SYNONYMS[word])) if word in _SYNONYMS else word for word in re.split(r"(\W+)", question)
    ]
    body, end = "".join(words)[:-1], question[-1]
    text = rng.choice(_FRAMES).format(body) + rng.choice((end, end, end, ""))
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text
