"""The same questions in a person's own words: other verbs and word order, politeness, synonyms, British spelling.

A question is matched by what it asks, put into another template, and decorated. A fifth of the templates is held out:
training never shows them, and the split `wordings` asks in nothing else. What no intent matches stays as it is.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mmllm.scenes.absent import ask_absent
from mmllm.scenes.conversations import SceneConversation
from mmllm.scenes.questions import RELATIONS, QuestionTurn, plural
from mmllm.scenes.small_talk import talk
from mmllm.scenes.templates import HELD_OUT, INTENTS, UNKNOWN_QUESTIONS, UNKNOWN_THING_QUESTIONS, UNKNOWN_WORDS
from mmllm.scenes.world import COLORS, SHAPES, Scene

UNKNOWN = "unknown"
UNKNOWN_ANSWER = "i can tell you about shapes, colors, sizes, places, words and bars."
_KNOWN_WORDS: dict[str, Sequence[str]] = {
    "number": [str(number) for number in range(100)], "side": list(RELATIONS), "color": COLORS, "shape": SHAPES,
}  # fmt: skip
UNKNOWN_SHARE = 0.12  # chance of a turn that no picture answers, before each turn and at the end
SMALL_TALK_SHARE = 0.02  # chance of small talk there
ABSENT_SHARE = 0.06  # chance there of a question about what a single picture does not show
# Letters at random beside the real words of what is not in this world: a person knows more words than any list has.
_NONSENSE_SHARE = 0.35

_FRAMES = (
    *["{}"] * 12, "please, {}", "{} please", "{}, please", "hello, {}", "hi, {}", "hey, {}", "look at the picture: {}",
    "so, {}", "ok, {}", "one question: {}", "i want to know: {}", "can you tell me: {}", "well, {}", "tell me, {}",
    "now, {}", "excuse me, {}", "and {}", "in this picture, {}", "{} thanks", "could you tell me: {}", "i wonder, {}",
    "i'd like to know: {}", "please say: {}", "do you know: {}", "in the drawing, {}", "can you say {}",
)  # fmt: skip
_HAS_OPENING = re.compile(r"(and|please|hello|hi|hey|good|thanks?|bye|goodbye|great|many)\b")
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "picture": ("image", "photo", "drawing"), "pictures": ("images", "photos"),
    "color": ("colour",), "colored": ("coloured",), "shape": ("form",),
    "object": ("thing", "item"), "objects": ("things", "items", "shapes"),
    "large": ("big",), "larger": ("bigger",), "small": ("little",), "tall": ("high",),
    "tallest": ("highest", "biggest"), "shortest": ("lowest", "smallest"),
    "center": ("middle", "centre"), "above": ("over",), "below": ("under", "beneath", "underneath"),
}  # fmt: skip
_PLAIN = {synonym: word for word, synonyms in _SYNONYMS.items() for synonym in synonyms}
_PHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"\b(left|right) of\b", (r"to the \1 of", r"on the \1 of", r"\1 from")),
    (r"\bat the (top|bottom) (left|right)\b", (
        r"in the \1 \2", r"on the \1 \2", r"in the \1 \2 corner", r"at \1 \2", r"in the \1-\2 corner",
    )),
    (rf"\b({'|'.join(COLORS)}) object\b", (r"\1 one",)),
    (r"\b(what|where|who|how) is\b", (r"\1's", r"\1s")),
)  # fmt: skip


def plain_words(text: str) -> str:
    """The text with each synonym replaced by the word that it stands for."""
    return re.sub(r"\w+", lambda word: _PLAIN.get(word[0], word[0]), text)


def expand(template: str) -> Iterator[str]:
    """Every text that a template with choices in square brackets stands for."""
    parts = re.split(r"\[(.*?)\]", template)
    choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
    return (_tidy("".join(chosen)) for chosen in itertools.product(*choices))


def _choose(template: str, rng: random.Random) -> str:
    """One of the texts of `expand`, each choice with equal chances."""
    return _tidy(re.sub(r"\[(.*?)\]", lambda choice: rng.choice(choice[1].split("|")), template))


def _tidy(text: str) -> str:
    """Without the spaces that an empty choice leaves."""
    return re.sub(r" +(?=[ ?.!:,]|$)", "", text).strip()


@functools.cache
def split_templates(templates: tuple[str, ...], *, held_out: bool) -> tuple[str, ...]:
    """The templates that training never shows, which begin with HELD_OUT; or the others."""
    return tuple(one.removeprefix(HELD_OUT) for one in templates if one.startswith(HELD_OUT) == held_out)


def reword(question: str, rng: random.Random, *, held_out: bool) -> str:
    """The question in other words, from held-out templates or from the others; as it is where no intent matches."""
    for intent in INTENTS:
        if match := re.fullmatch(intent.pattern, question):
            template = _choose(rng.choice(split_templates(intent.templates, held_out=held_out)), rng)
            values = [value for value in match.groups() if value is not None]
            bare = re.sub(r"^an? ", "", values[0]) if values else ""
            return _decorate(template.format(*values, bare=bare, many=plural(bare)), rng)
    return question


def ask_unknown(rng: random.Random, *, held_out: bool, only_things: bool = False) -> tuple[str, str]:
    """A question that no picture of this world answers, and the one honest answer.

    With `only_things` it is about a thing of another world, never about the weather or the capital of France.
    """
    templates = UNKNOWN_THING_QUESTIONS if only_things or rng.random() < 0.4 else UNKNOWN_QUESTIONS
    template = _choose(rng.choice(split_templates(templates, held_out=held_out)), rng)

    def word_for(slot: re.Match[str]) -> str:
        if slot[1] in _KNOWN_WORDS:
            word = rng.choice(_KNOWN_WORDS[slot[1]])
        elif rng.random() < _NONSENSE_SHARE:
            word = _nonsense(rng)
        else:
            word = rng.choice(split_templates(UNKNOWN_WORDS[slot[1]], held_out=held_out))
        return plural(word) if slot[2] else word

    return _decorate(re.sub(r"\{(\w+)\}(s\b)?", word_for, template), rng), UNKNOWN_ANSWER


def _nonsense(rng: random.Random) -> str:
    """Two to ten random letters, mostly in syllables."""
    if rng.random() < 0.3:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7)))
    syllables = (
        rng.choice("bcdfghjklmnprstvwyz") + rng.choice(("a", "e", "i", "o", "u", "oo", "ea")) for _ in range(2)
    )
    return (
        rng.choice(("", "s", "br", "cl", "tr")) + "".join(syllables) + rng.choice(("", "n", "r", "t", "nk", "l", "st"))
    )


def _decorate(question: str, rng: random.Random) -> str:
    """Politeness, synonyms, short forms, capitals, and a question mark that is there or not."""
    for pattern, phrases in _PHRASES:
        if rng.random() < 0.35:
            question = re.sub(pattern, rng.choice(phrases), question)
    words = [
        rng.choice((word, *_SYNONYMS[word])) if word in _SYNONYMS else word for word in re.split(r"(\W+)", question)
    ]
    text = re.sub(r"\ban? (?=(\w))", lambda a: "an " if a[1] in "aeiou" else "a ", "".join(words))
    body, end = (text[:-1], text[-1]) if text[-1] in "?.!" else (text, "")
    frame = "{}" if _HAS_OPENING.match(body) else rng.choice(_FRAMES)
    text = frame.format(body) + rng.choice((end, end, end, end, "", "", f" {end}".rstrip()))
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text


@dataclass(frozen=True)
class Wordings:
    """Rewords a fraction of the questions, and adds turns that the pictures do not answer, and small talk.

    Without `small_talk` all turns are about pictures, as they should be for an LLM that can already talk.
    """

    fraction: float = 0.0
    held_out: bool = False  # only in wordings that training never shows, or only in the others
    small_talk: bool = field(default=True, repr=False)  # what is written seeds the words, which should stay the same

    def apply(self, conversation: SceneConversation, rng: random.Random) -> SceneConversation:
        """The conversation in these words, with further turns; as it is where the fraction is 0."""
        if not self.fraction:
            return conversation
        turns: list[QuestionTurn] = []
        for turn in conversation.turns:
            if not turn.num_needed:  # a follow-up stays behind what it follows
                turns += self._extra_turns(conversation.scenes, rng)
            turns.append(self._maybe_reworded(turn, rng))
        return replace(conversation, turns=(*turns, *self._extra_turns(conversation.scenes, rng)))

    def reworded(self, conversation: SceneConversation, rng: random.Random) -> SceneConversation:
        """With the same turns and no others."""
        return replace(conversation, turns=tuple(self._maybe_reworded(turn, rng) for turn in conversation.turns))

    def _maybe_reworded(self, turn: QuestionTurn, rng: random.Random) -> QuestionTurn:
        return self._reworded(turn, rng) if rng.random() < self.fraction else turn

    def _reworded(self, turn: QuestionTurn, rng: random.Random) -> QuestionTurn:
        return replace(turn, question=reword(turn.question, rng, held_out=self.held_out), plain=turn.question)

    def _extra_turns(self, scenes: tuple[Scene, ...], rng: random.Random) -> Sequence[QuestionTurn]:
        draw = rng.random()
        if draw < UNKNOWN_SHARE:
            asked = ask_unknown(rng, held_out=self.held_out, only_things=not self.small_talk)
            return (QuestionTurn(UNKNOWN, *asked),)
        draw -= UNKNOWN_SHARE
        if draw < SMALL_TALK_SHARE:
            return (self._reworded(talk(rng, bool(scenes)), rng),) if self.small_talk else ()
        draw -= SMALL_TALK_SHARE
        if draw < ABSENT_SHARE and len(scenes) == 1:
            return (self._reworded(ask_absent(scenes[0], rng), rng),)
        return ()
