"""Transcripts for checkpoints of text encoding 1, in which every piece of the template is encoded by itself.

Such a checkpoint gets its prompts as it was trained. Its saved chat template lists what opens and closes each role's
turn.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from mmllm.batch import IMAGE_TOKEN, ImageRef, Message
from mmllm.chat.templates import ChatError
from mmllm.chat.transcript import PROBE_ANSWER, AnswerSpan, Transcript

_LISTS = re.compile(r"\{% set open = (\{.*?\}) %\}\{% set close = (\{.*?\}) %\}", re.DOTALL)
_TEXT = r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_BEGIN = re.compile(r"\{\{ " + _TEXT + r" \}\}")
_DEFAULT_SYSTEM = re.compile(r"messages\[0\]\.role != 'system' %\}\{\{ " + _TEXT + r" \}\}")


class PiecewiseTranscriptRenderer:
    """Renders transcripts as `TranscriptRenderer` does, with a cut around every piece. Raises ChatError.

    `saved_jinja` is the chat template that the checkpoint was saved with.
    """

    def __init__(self, tokenizer: Any, saved_jinja: str):
        lists = _LISTS.search(saved_jinja)
        begin = _BEGIN.search(saved_jinja, lists.end() if lists else 0)
        if lists is None or begin is None:
            raise ChatError("this checkpoint's chat template is not as `mmllm` wrote it, so it cannot be used")
        self.open: dict[str, str] = ast.literal_eval(lists[1])
        self.close: dict[str, str] = ast.literal_eval(lists[2])
        self.begin: str = ast.literal_eval(begin[1])
        self.closing = self.close["assistant"]
        default = _DEFAULT_SYSTEM.search(saved_jinja)
        self.default_system: str = ast.literal_eval(default[1]) if default else ""
        self.strips = "content | trim" in saved_jinja
        self.keeps_user_text = "m.role != 'user'" not in saved_jinja

    def frame_text(self) -> str:
        """Everything that the template writes around contents."""
        return "\n".join([self.begin, *self.open.values(), *self.close.values()])

    def prompt_transcript(self, messages: Sequence[Message]) -> Transcript:
        return self.full_transcript([*messages, Message("assistant", (PROBE_ANSWER,))])

    def full_transcript(self, messages: Sequence[Message]) -> Transcript:
        text, cuts, images = self.begin, [len(self.begin)], []
        contents: list[tuple[int, int]] = []
        answers: list[AnswerSpan] = []

        def add(piece: str) -> None:
            nonlocal text
            text += piece
            cuts.append(len(text))

        if not messages or messages[0].role != "system":
            for piece in self._default_pieces():
                add(piece)
        for message in messages:
            if message.role not in self.open:
                raise ChatError("this chat template has no system turn, but the conversation starts with one")
            add(self.open[message.role])
            start = len(text)
            for part in self._parts(message):
                if isinstance(part, ImageRef):
                    images.append(len(text))
                add(IMAGE_TOKEN if isinstance(part, ImageRef) else part)
            contents.append((start, len(text)))
            content_end = len(text)
            add(self.close[message.role])
            if message.role == "assistant":
                answers.append(AnswerSpan(start, content_end, len(text)))
        return Transcript(text, tuple(images), tuple(contents), tuple(answers), tuple(cuts))

    def _default_pieces(self) -> list[str]:
        """The default system turn, in the pieces in which it was encoded."""
        if not self.default_system:
            return []
        opening, closing = self.open["system"], self.close["system"]
        content = self.default_system[len(opening) : len(self.default_system) - len(closing)]
        return [opening, content, closing]

    def _parts(self, message: Message) -> list[str | ImageRef]:
        parts: list[str | ImageRef] = list(message.parts)
        if message.role == "user" and not self.keeps_user_text:
            parts = [part for part in parts if isinstance(part, ImageRef)]
        if self.strips and parts:
            if isinstance(parts[0], str):
                parts[0] = parts[0].lstrip()
            if isinstance(parts[-1], str):
                parts[-1] = parts[-1].rstrip()
        return parts
