"""A conversation as one text, the transcript, with the spans of its pictures, contents and answers.

The content of each message is rendered between two sentinels, characters that Unicode leaves to private use. So its
place is known, whatever the template writes around it. Without the sentinels, the text is what transformers renders.
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

_FIRST_SENTINEL = 0x10A000  # in private use area B, above the code points that icon fonts use
# Before the `<image>` of a picture; but after it, where the picture follows another one directly.
_IMAGE_SENTINEL, _LATE_IMAGE_SENTINEL = "\U0010fffc", "\U0010fffd"
_SENTINELS = re.compile("[\U0010a000-\U0010fffd]")
_BLANK = "\u2003"  # white space that no template writes
PROBE_ANSWER = "A"  # in place of the answer that is still to come; most answers begin with a letter


@dataclass(frozen=True)
class AnswerSpan:
    """Characters of one answer: from the end of the prompt to that of the content, then what closes it, up to `end`."""

    start: int
    content_end: int
    end: int


@dataclass(frozen=True)
class Transcript:
    """A rendered conversation, with spans in characters of `text`.

    `images` are where the `<image>` marks of pictures begin; an `<image>` anywhere else was typed. `contents` are the
    spans of the messages' contents. The text is tokenised separately before and after each of the `cuts`.
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
class _RenderedText:
    """A rendered text without its sentinels, and where they were. White space around a content is outside of them."""

    text: str
    images: tuple[int, ...]
    starts: dict[int, int]  # {message: where its content begins}
    ends: dict[int, int]  # {message: where its content ends}
    blanks: dict[int, str] = field(default_factory=dict)  # {message: white space after its content, as it was given}

    def end_before(self, number: int, following: str) -> int:
        """Where a message ends: after its trailing white space, where the template kept that before `following`."""
        end, blank = self.ends[number], self.blanks.get(number, "")
        keeps = not self.text.startswith(following, end) and self.text.startswith(blank + following, end)
        return end + len(blank) if keeps else end


class TranscriptRenderer:
    """Renders transcripts with one template and one tokenizer's special tokens.

    The constructor raises ChatError for a template with which prompts could differ from what was trained: one that
    writes today's date, or changes a turn when another one follows.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate):
        self.tokenizer, self.template = tokenizer, template
        self._is_verbatim = template.content == "text" and copies_contents_verbatim(template.jinja)
        self._skeleton = functools.lru_cache(maxsize=256)(self._render_skeleton)
        self._prompt_tail, self.closing = "", ""
        question = [Message("user", ("Uu0",))]
        refuse_dates(tokenizer, template.jinja, [[self._turn("user", "Uu0")]])
        self._prompt_tail = self._tail_of_prompt(question)
        answered = [*question, Message("assistant", (PROBE_ANSWER,))]
        rendered = self._render(answered)
        if 1 not in rendered.ends:
            raise ChatError("the chat template leaves the answer out of a conversation; choose another one")
        self.closing = rendered.text[rendered.ends[1] :]
        self._refuse_changing_turns(answered)

    def _refuse_changing_turns(self, answered: list[Message]) -> None:
        """Raises ChatError where a turn changes when others follow: training would then teach other prompts."""
        longer = [*answered, Message("user", ("Uu2",)), Message("assistant", (PROBE_ANSWER,))]
        refuse_dates(self.tokenizer, self.template.jinja, [[self._turn("system", "Ss3"), self._turn("user", "Uu0")]])
        try:
            text = self._render(longer).text
        except ChatError:  # the template takes one turn only; a conversation with more is refused when it is rendered
            return
        for messages in (longer[:1], longer[:3]):
            prompt = self.prompt_transcript(messages).prompt
            if not text.startswith(prompt):
                raise ChatError(
                    "the chat template changes a turn when another follows, so the prompt of a chat could not be "
                    f"trained: {text!r} does not begin with {prompt!r}; choose one of {', '.join(TEMPLATES)}"
                )

    def frame_text(self) -> str:
        """Everything that the template writes around contents, except what comes only before the last answer."""
        turns = [Message("user", ("Uu0",)), Message("assistant", (PROBE_ANSWER,))]
        try:
            rendered, last = self._render([*turns, *turns]), 2
        except ChatError:  # the template takes one turn only
            rendered, last = self._render(turns), 1
        starts, ends = rendered.starts, rendered.ends
        borders = [0, *(place for number in range(last) for place in (starts.get(number, ends[number]), ends[number]))]
        until = starts.get(last, ends[last])
        around = [rendered.text[i:j] for i, j in zip(borders[::2], [*borders[1::2], until], strict=True)]
        return "\n".join([*around, rendered.text[ends[len(ends) - 1] :], self._prompt_tail if last == 1 else ""])

    def full_transcript(self, messages: Sequence[Message]) -> Transcript:
        """The conversation with all its answers. Raises ChatError where the template leaves a turn out."""
        rendered = self._render(messages)
        answers = []
        for number, message in enumerate(messages):
            if number not in rendered.ends:
                raise ChatError(_left_out_message(message))
            if message.role == "assistant":
                follows_user = number > 0 and messages[number - 1].role == "user"
                answers.append(self._answer_span(rendered, number, follows_user))
        contents = tuple(sorted((rendered.starts.get(number, end), end) for number, end in rendered.ends.items()))
        return Transcript(rendered.text, rendered.images, contents, tuple(answers))

    def prompt_transcript(self, messages: Sequence[Message]) -> Transcript:
        """The conversation with PROBE_ANSWER as the answer to its last message, whose prompt is the text before it."""
        return self.full_transcript([*messages, Message("assistant", (PROBE_ANSWER,))])

    def _answer_span(self, rendered: _RenderedText, number: int, follows_user: bool) -> AnswerSpan:
        """From where the text departs from the prompt's, to where it departs from that at the end of a conversation."""
        text, content_end = rendered.text, rendered.end_before(number, self.closing)
        start = rendered.starts.get(number)
        if follows_user:
            question_end = rendered.end_before(number - 1, self._prompt_tail)
            lead = text[question_end:start] if start is not None else text[question_end:content_end]
            start = question_end + _shared_prefix_length(lead, self._prompt_tail)
        if start is None:
            raise ChatError("the chat template changes the beginning of an answer, so where it begins is not known")
        later_starts = [place for place in rendered.starts.values() if place > content_end]
        rest = text[content_end : min(later_starts, default=len(text))]
        return AnswerSpan(start, content_end, content_end + _shared_prefix_length(rest, self.closing))

    def _tail_of_prompt(self, question: list[Message]) -> str:
        """What the template writes in a prompt after the question."""
        rendered = self._render(question, prompt=True)
        if 0 not in rendered.ends:
            raise ChatError(_left_out_message(question[0]))
        return rendered.text[rendered.ends[0] :]

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> _RenderedText:
        """Raises ChatError where the template writes something else with sentinels in the contents than without."""
        messages = [self._without_hidden_text(message) for message in messages]
        contents = [_flatten(message) for message in messages]
        if self._is_verbatim and all(text.strip() for text, _ in contents):
            return self._fill(self._skeleton(tuple(message.role for message in messages), prompt), contents)
        if any(_SENTINELS.search(text) for text, _ in contents):
            raise ChatError("a text holds characters from U+10A000 on, which Unicode gives no meaning")
        chats = [
            [
                self._turn(message.role, write_content(number, *content))
                for number, (message, content) in enumerate(zip(messages, contents, strict=True))
            ]
            for write_content in (_without_sentinels, _with_sentinels)
        ]
        expected, with_sentinels = render_template(self.tokenizer, self.template.jinja, chats, prompt=prompt)
        rendered = _remove_sentinels(with_sentinels)
        if rendered.text != expected:
            raise ChatError(
                "the chat template changes what it writes by the content of a turn, so answers cannot be located: "
                f"{_first_difference(expected, rendered.text)}"
            )
        return replace(
            rendered, blanks={number: text[len(text.rstrip()) :] for number, (text, _) in enumerate(contents)}
        )

    def _render_skeleton(self, roles: tuple[str, ...], prompt: bool) -> tuple[tuple[str, int], ...]:
        """What a verbatim template writes around contents: (text, number of the message whose content follows).

        The text after the last message has the number -1. A _BLANK beside the place of a content is left where the
        template keeps white space there.
        """
        chat = [self._turn(role, f"{_BLANK}{_sentinel(number)}{_BLANK}") for number, role in enumerate(roles)]
        text = render_template(self.tokenizer, self.template.jinja, [chat], prompt=prompt)[0]
        skeleton, last = [], 0
        for match in _SENTINELS.finditer(text):
            skeleton.append((text[last : match.start()], (ord(match[0]) - _FIRST_SENTINEL) // 2))
            last = match.end()
        return (*skeleton, (text[last:], -1))

    def _fill(self, skeleton: Sequence[tuple[str, int]], contents: Sequence[tuple[str, list[int]]]) -> _RenderedText:
        """The skeleton with the contents in their places."""
        parts: list[str] = []
        images: list[int] = []
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        length = 0
        next_texts = [text for text, _ in skeleton[1:]]
        keeps_right = False
        for (skeleton_text, number), next_text in zip(skeleton, [*next_texts, ""], strict=True):
            around = skeleton_text.removeprefix(_BLANK) if keeps_right else skeleton_text
            keeps_left = number >= 0 and around.endswith(_BLANK)
            around = around.removesuffix(_BLANK) if keeps_left else around
            parts.append(around)
            length += len(around)
            if number < 0:
                break
            keeps_right = next_text.startswith(_BLANK)
            text, places = contents[number]
            begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
            first, last = 0 if keeps_left else begin, len(text) if keeps_right else end
            parts.append(text[first:last])
            images += [length + place - first for place in places]
            starts[number], ends[number] = length + begin - first, length + last - first
            length += last - first
        return _RenderedText("".join(parts), tuple(images), starts, ends)

    def _without_hidden_text(self, message: Message) -> Message:
        """The message without the text that the template does not show: `plain` shows only the pictures of a user."""
        if message.role == "user" and not self.template.keeps_user_text:
            return Message("user", tuple(part for part in message.parts if isinstance(part, ImageRef)))
        return message

    def _turn(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": text if self.template.content == "text" else [{"type": "text", "text": text}]}


def _flatten(message: Message) -> tuple[str, list[int]]:
    """(the content of a message as one text, where the marks of its pictures begin in it)."""
    text, places = "", []
    for part in message.parts:
        if isinstance(part, ImageRef):
            places.append(len(text))
        text += IMAGE_TOKEN if isinstance(part, ImageRef) else part
    return text, places


def _sentinel(number: int, *, is_end: bool = False) -> str:
    """The character that begins or ends the content of a message."""
    return chr(_FIRST_SENTINEL + 2 * number + is_end)


def _without_sentinels(number: int, text: str, places: Sequence[int]) -> str:
    return text


def _with_sentinels(number: int, text: str, places: Sequence[int]) -> str:
    """The text with sentinels at its pictures, and around it, but inside the white space that many templates strip."""
    begin = len(text) - len(text.lstrip()) if text.strip() else len(text)
    end = max(len(text.rstrip()), begin)
    inner, last = "", begin
    for place in places:
        is_late = place == last > begin
        inner += text[last:place] + (IMAGE_TOKEN + _LATE_IMAGE_SENTINEL if is_late else _IMAGE_SENTINEL + IMAGE_TOKEN)
        last = place + len(IMAGE_TOKEN)
    return f"{text[:begin]}{_sentinel(number)}{inner}{text[last:end]}{_sentinel(number, is_end=True)}{text[end:]}"


def _remove_sentinels(text: str) -> _RenderedText:
    images: list[int] = []
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    parts: list[str] = []
    length = last = 0
    for match in _SENTINELS.finditer(text):
        parts.append(text[last : match.start()])
        length += match.start() - last
        last = match.end()
        if match[0] == _IMAGE_SENTINEL:
            images.append(length)
        elif match[0] == _LATE_IMAGE_SENTINEL:
            images.append("".join(parts).rindex(IMAGE_TOKEN))
        else:
            number, is_end = divmod(ord(match[0]) - _FIRST_SENTINEL, 2)
            (ends if is_end else starts)[number] = length
    return _RenderedText("".join([*parts, text[last:]]), tuple(images), starts, ends)


def _left_out_message(message: Message) -> str:
    if message.role == "system":
        return "this chat template has no system turn, but the conversation starts with one"
    return f"the chat template leaves out what the {message.role} says: {message.text[:60]!r}"


def _shared_prefix_length(text: str, prefix: str) -> int:
    """How many characters of `prefix` the text begins with."""
    if text.startswith(prefix):
        return len(prefix)
    pairs = enumerate(zip(text, prefix, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(text), len(prefix)))


def _first_difference(expected: str, rendered: str) -> str:
    start = _shared_prefix_length(expected, rendered)
    first, end = max(0, start - 20), start + 40
    return f"{expected[first:end]!r} becomes {rendered[first:end]!r} where contents are marked"
