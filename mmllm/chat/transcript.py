"""A conversation as one text: what its template writes, where its pictures are in it, and which part is answer.

Every text of a message is rendered between two marks of its own, characters that Unicode leaves to private use, so its
place is known whatever the template does around it. The text without marks is what transformers renders.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmllm.batch import IMAGE_TOKEN, ImageRef, Message
from mmllm.chat.templates import TEMPLATES, ChatError, ChatTemplate, refuse_dates, render_template
from mmllm.chat.verbatim import copies_contents_verbatim

_FIRST_MARK = 0x10A000  # private use area B, behind what icon fonts have in it
_IMAGE_MARK, _LATE_IMAGE_MARK = "\U0010fffc", "\U0010fffd"  # before a picture; after one that follows another
_MARKS = re.compile("[\U0010a000-\U0010fffd]")
_BLANK = "\u2003"  # a space that no template writes
PROBE_ANSWER = "A"  # stands for the answer that is asked for: most answers begin with a letter


@dataclass(frozen=True)
class AnswerSpan:
    """Characters of one answer: from where the prompt ends, over its words and what closes them."""

    start: int
    words_end: int
    end: int


@dataclass(frozen=True)
class Transcript:
    """A rendered conversation, with spans in characters of `text`.

    `images` are the places of the real `<image>` marks; `contents` are the words of people. `cuts` are places where
    the text before is encoded by itself.
    """

    text: str
    images: tuple[int, ...]
    contents: tuple[tuple[int, int], ...]
    answers: tuple[AnswerSpan, ...]
    cuts: tuple[int, ...] = ()

    @property
    def prompt(self) -> str:
        """The text before the last answer."""
        return self.text[: self.answers[-1].start]


@dataclass(frozen=True)
class _UnmarkedText:
    """A rendered text without its marks, and the places of the marks in it."""

    text: str
    images: tuple[int, ...]
    starts: dict[int, int]  # number of the message -> where its words begin
    ends: dict[int, int]
    blanks: dict[int, str] = field(default_factory=dict)  # behind the words, which the template may have kept

    def end_before(self, number: int, following: str) -> int:
        """Where a message ends: behind the blanks after its words, where what should follow is behind them."""
        end, blank = self.ends[number], self.blanks.get(number, "")
        keeps = not self.text.startswith(following, end) and self.text.startswith(blank + following, end)
        return end + len(blank) if keeps else end


class TranscriptRenderer:
    """Renders conversations with one template and one tokenizer's special tokens.

    Raises ChatError, when it is made, for a template that no training could repeat: one that writes today's date, or
    changes a turn when another one follows.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate):
        self.tokenizer, self.template = tokenizer, template
        self._is_inert = template.content == "text" and copies_contents_verbatim(template.jinja)
        self._skeleton = functools.lru_cache(maxsize=256)(self._render_skeleton)
        self._prompt_tail, self.closing = "", ""
        asked = [Message("user", ("Uu0",))]
        refuse_dates(tokenizer, template.jinja, [[self._turn("user", "Uu0")]])
        self._prompt_tail = self._tail(asked)
        whole = [*asked, Message("assistant", (PROBE_ANSWER,))]
        marked = self._marked(whole)
        if 1 not in marked.ends:
            raise ChatError("the chat template leaves the answer out of a conversation; choose another one")
        self.closing = marked.text[marked.ends[1] :]
        self._check_repeats(whole)

    def _check_repeats(self, whole: list[Message]) -> None:
        """A turn must read the same when others follow, or training would teach other prompts than are asked."""
        longer = [*whole, Message("user", ("Uu2",)), Message("assistant", (PROBE_ANSWER,))]
        refuse_dates(self.tokenizer, self.template.jinja, [[self._turn("system", "Ss3"), self._turn("user", "Uu0")]])
        try:
            text = self._marked(longer).text
        except ChatError:  # it takes no second turn: conversations that have one are refused, each for itself
            return
        for asked in (longer[:1], longer[:3]):
            prompt = self.prompt_transcript(asked).prompt
            if not text.startswith(prompt):
                raise ChatError(
                    "the chat template changes a turn when another follows, so training could not teach the prompt "
                    f"that is asked: {prompt!r} is no beginning of {text!r}; choose one of {', '.join(TEMPLATES)}"
                )

    def frame_text(self) -> str:
        """What the template writes around turns: everything but their words, and what is only before a last answer."""
        turns = [Message("user", ("Uu0",)), Message("assistant", (PROBE_ANSWER,))]
        try:
            marked, last = self._marked([*turns, *turns]), 2
        except ChatError:  # it takes no second turn
            marked, last = self._marked(turns), 1
        borders = [0, *(place for n in range(last) for place in (marked.starts.get(n, marked.ends[n]), marked.ends[n]))]
        until = marked.starts.get(last, marked.ends[last])
        around = [marked.text[i:j] for i, j in zip(borders[::2], [*borders[1::2], until], strict=True)]
        return "\n".join(
            [*around, marked.text[marked.ends[len(marked.ends) - 1] :], self._prompt_tail if last == 1 else ""]
        )

    def full_transcript(self, messages: Sequence[Message]) -> Transcript:
        """The conversation with all its answers. Raises ChatError where the template leaves a turn out."""
        marked = self._marked(messages)
        answers = []
        for number, message in enumerate(messages):
            if number not in marked.ends:
                raise ChatError(_left_out_message(message))
            if message.role == "assistant":
                follows_user = number > 0 and messages[number - 1].role == "user"
                answers.append(self._answer(marked, number, follows_user))
        contents = tuple(sorted((marked.starts.get(number, end), end) for number, end in marked.ends.items()))
        return Transcript(marked.text, marked.images, contents, tuple(answers))

    def prompt_transcript(self, messages: Sequence[Message]) -> Transcript:
        """The conversation with `PROBE_ANSWER` as the answer to its last message: the prompt is what is before it."""
        return self.full_transcript([*messages, Message("assistant", (PROBE_ANSWER,))])

    def _answer(self, marked: _UnmarkedText, number: int, follows_user: bool) -> AnswerSpan:
        """From where the text stops to be that of the prompt, to where it stops to be that of a conversation's end."""
        text, words_end = marked.text, marked.end_before(number, self.closing)
        start = marked.starts.get(number)
        if follows_user:
            before = marked.end_before(number - 1, self._prompt_tail)
            lead = text[before:start] if start is not None else text[before:words_end]
            start = before + _shared_prefix_length(lead, self._prompt_tail)
        if start is None:
            raise ChatError("the chat template changes the beginning of an answer, so where it begins is not known")
        following = [place for place in marked.starts.values() if place > words_end]
        rest = text[words_end : min(following, default=len(text))]
        return AnswerSpan(start, words_end, words_end + _shared_prefix_length(rest, self.closing))

    def _tail(self, asked: list[Message]) -> str:
        """What the template writes from a question's end to where the answer begins."""
        marked = self._marked(asked, prompt=True)
        if 0 not in marked.ends:
            raise ChatError(_left_out_message(asked[0]))
        return marked.text[marked.ends[0] :]

    def _marked(self, messages: Sequence[Message], *, prompt: bool = False) -> _UnmarkedText:
        """Raises ChatError where the template writes something else of a marked text than of the text itself."""
        messages = [self._shown(message) for message in messages]
        texts = [_flatten(message) for message in messages]
        if self._is_inert and all(text.strip() for text, _ in texts):
            return self._filled(texts, self._skeleton(tuple(message.role for message in messages), prompt))
        if any(_MARKS.search(text) for text, _ in texts):
            raise ChatError("a text holds characters from U+10A000 on, which Unicode gives no meaning")
        chats = [
            [
                self._turn(message.role, make(number, *text))
                for number, (message, text) in enumerate(zip(messages, texts, strict=True))
            ]
            for make in (_unmarked, _marked)
        ]
        plain, text = render_template(self.tokenizer, self.template.jinja, chats, prompt=prompt)
        found = _read_marks(text)
        if found.text != plain:
            raise ChatError(
                "the chat template writes a turn otherwise for what its words are, so answers cannot be found in it: "
                f"{_first_difference(plain, found.text)}"
            )
        return replace(found, blanks={number: text[len(text.rstrip()) :] for number, (text, _) in enumerate(texts)})

    def _render_skeleton(self, roles: tuple[str, ...], prompt: bool) -> tuple[tuple[str, int], ...]:
        """What a template that writes words as they are writes around them: (text, number of the message after it).

        The text after the last message has the number -1. Blanks around the place of the words are left where the
        template keeps them.
        """
        chat = [self._turn(role, f"{_BLANK}{_mark(number)}{_BLANK}") for number, role in enumerate(roles)]
        text = render_template(self.tokenizer, self.template.jinja, [chat], prompt=prompt)[0]
        places = [*_MARKS.finditer(text), None]
        out, last = [], 0
        for found in places:
            out.append(
                (
                    text[last : found.start() if found else len(text)],
                    (ord(found[0]) - _FIRST_MARK) // 2 if found else -1,
                )
            )
            last = found.end() if found else last
        return tuple(out)

    def _filled(self, texts: Sequence[tuple[str, list[int]]], skeleton: Sequence[tuple[str, int]]) -> _UnmarkedText:
        """The skeleton with the words in their places."""
        parts: list[str] = []
        images: list[int] = []
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        length = 0
        following = [written for written, _ in skeleton[1:]]
        keeps_right = False
        for (written, number), behind in zip(skeleton, [*following, ""], strict=True):
            around = written.removeprefix(_BLANK) if keeps_right else written
            keeps_left = number >= 0 and around.endswith(_BLANK)
            around = around.removesuffix(_BLANK) if keeps_left else around
            parts.append(around)
            length += len(around)
            if number < 0:
                break
            keeps_right = behind.startswith(_BLANK)
            text, places = texts[number]
            begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
            first, last = 0 if keeps_left else begin, len(text) if keeps_right else end
            parts.append(text[first:last])
            images += [length + place - first for place in places]
            starts[number], ends[number] = length + begin - first, length + last - first
            length += last - first
        return _UnmarkedText("".join(parts), tuple(images), starts, ends)

    def _shown(self, message: Message) -> Message:
        if message.role == "user" and not self.template.keeps_user_text:
            return Message("user", tuple(part for part in message.parts if isinstance(part, ImageRef)))
        return message

    def _turn(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": text if self.template.content == "text" else [{"type": "text", "text": text}]}


def _flatten(message: Message) -> tuple[str, list[int]]:
    """A message as one text, and where its pictures are in it."""
    text, places = "", []
    for part in message.parts:
        if isinstance(part, ImageRef):
            places.append(len(text))
        text += IMAGE_TOKEN if isinstance(part, ImageRef) else part
    return text, places


def _mark(number: int, *, is_end: bool = False) -> str:
    return chr(_FIRST_MARK + 2 * number + is_end)


def _unmarked(number: int, text: str, places: Sequence[int]) -> str:
    return text


def _marked(number: int, text: str, places: Sequence[int]) -> str:
    """The text with marks around its words, inside the blanks that many templates strip, and at its pictures."""
    begin = len(text) - len(text.lstrip()) if text.strip() else len(text)
    end = max(len(text.rstrip()), begin)
    inner, last = "", begin
    for place in places:
        is_late = place == last > begin
        inner += text[last:place] + (IMAGE_TOKEN + _LATE_IMAGE_MARK if is_late else _IMAGE_MARK + IMAGE_TOKEN)
        last = place + len(IMAGE_TOKEN)
    return f"{text[:begin]}{_mark(number)}{inner}{text[last:end]}{_mark(number, is_end=True)}{text[end:]}"


def _read_marks(text: str) -> _UnmarkedText:
    images: list[int] = []
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    parts: list[str] = []
    length = last = 0
    for found in _MARKS.finditer(text):
        parts.append(text[last : found.start()])
        length += found.start() - last
        last = found.end()
        if found[0] == _IMAGE_MARK:
            images.append(length)
        elif found[0] == _LATE_IMAGE_MARK:
            images.append("".join(parts).rindex(IMAGE_TOKEN))
        else:
            number, is_end = divmod(ord(found[0]) - _FIRST_MARK, 2)
            (ends if is_end else starts)[number] = length
    return _UnmarkedText("".join([*parts, text[last:]]), tuple(images), starts, ends)


def _left_out_message(message: Message) -> str:
    if message.role == "system":
        return "this chat template has no system turn, but the conversation starts with one"
    return f"the chat template leaves out what the {message.role} says: {message.text[:60]!r}"


def _shared_prefix_length(text: str, beginning: str) -> int:
    """How many characters of `beginning` the text begins with."""
    if text.startswith(beginning):
        return len(beginning)
    pairs = enumerate(zip(text, beginning, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(text), len(beginning)))


def _first_difference(plain: str, marked: str) -> str:
    start = _shared_prefix_length(plain, marked)
    return f"{plain[max(0, start - 20) : start + 40]!r} is {marked[max(0, start - 20) : start + 40]!r} with marks in it"
