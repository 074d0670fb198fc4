"""One tab's conversation: the prompt for the model, and the messages that the page shows.

A turn's pictures come before its text, in this and in every later prompt. A turn that failed is shown but left out of
later prompts. A turn that was stopped before its first word is left out too, and its pictures go to the next turn.
"""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmllm.batch import PICTURE_LABEL, Example, ImageSource, Message
from mmllm.chat.conversation import user_message
from mmllm.images import ImageError

MAX_PICTURES = 4  # of one turn; a whole conversation is limited by the model's context length
MAX_FILE_SIZE = "64mb"  # enough for a photo of 108 megapixels; `load_image` limits the number of pixels
SHOWN_PX = 1280  # longer side of a picture in the chat
# page.css shows it after a second: most turns do not have to wait
QUEUED = '<div class="thinking queued">waiting for other tabs’ answers to end</div>'
# A line that begins or ends a block of code: (indent, list or quote marks), (fence), (rest of the line)
FENCE = re.compile(r"([ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)*)(`{3,}|~{3,})(.*)")
TYPED = '<div class="typed">{}</div>'  # page.js uses this class too
THINKING = '<div class="thinking"><span>thinking</span></div>'


@dataclass(frozen=True)
class ChatPicture:
    """A picture of a turn."""

    file: Path  # as the user sent it
    shown: Path  # a PNG or JPEG, which every browser shows
    image: ImageSource  # as the model takes it


@dataclass(eq=False)
class ChatTurn:
    """A question and its answer. `finish_reason` is the reply's; None until the reply has ended."""

    text: str
    pictures: tuple[ChatPicture, ...] = ()
    answer: str = ""
    finish_reason: str | None = None
    problem: str = ""  # why there is no answer
    is_queued: bool = True  # until the model starts on it

    @property
    def is_open(self) -> bool:
        return self.finish_reason is None and not self.problem


def example_of(turns: Sequence[ChatTurn], *, label: str = PICTURE_LABEL) -> Example:
    """The prompt that ends with the last turn's question. `label` is the text before each of several pictures."""
    messages: list[Message] = []
    images: list[ImageSource] = []
    waiting: list[ImageSource] = []  # pictures of turns that were stopped before their first word
    for turn in turns:
        is_last = turn is turns[-1]
        if turn.problem and not is_last:
            continue
        waiting += [picture.image for picture in turn.pictures]
        if not is_last and not turn.answer:
            continue
        messages.append(user_message(turn.text, len(waiting), len(images), label=label))
        images += waiting
        waiting = []
        if not is_last:
            messages.append(Message("assistant", (turn.answer,)))
    return Example("chat", "demo", tuple(messages), tuple(images))


def numbered_messages(turns: Sequence[ChatTurn]) -> list[tuple[int, dict[str, Any]]]:
    """The messages of gr.Chatbot, each with the number of its turn."""
    messages: list[tuple[int, dict[str, Any]]] = []
    for number, turn in enumerate(turns):
        if turn.pictures:
            messages.append((number, {"role": "user", "content": pictures_html(turn.pictures)}))
        messages.append((number, {"role": "user", "content": typed_html(turn.text)}))
        if answer := answer_markdown(turn):
            messages.append((number, {"role": "assistant", "content": answer}))
    return messages


def chatbot_messages(turns: Sequence[ChatTurn]) -> list[dict[str, Any]]:
    """The messages of gr.Chatbot."""
    return [message for _, message in numbered_messages(turns)]


def turn_of_message(turns: Sequence[ChatTurn], index: int) -> int:
    """The number of the turn to which the chat's message at `index` belongs."""
    return numbered_messages(turns)[index][0]


def typed_html(text: str) -> str:
    """A question as it was typed, as one line of HTML in which Markdown changes nothing."""
    return TYPED.format(
        html.escape(text).replace("\n", "<br>").replace("\t", "&#9;")
    )  # Markdown would turn tabs into spaces


def typed_text(shown: str) -> str:
    """The inverse of `typed_html`; any other text is returned as it is."""
    begin, end = TYPED.split("{}")
    if not (shown.startswith(begin) and shown.endswith(end)):
        return shown
    return html.unescape(shown.removeprefix(begin).removesuffix(end).replace("<br>", "\n"))


def pictures_html(pictures: Iterable[ChatPicture]) -> str:
    links = []
    for number, picture in enumerate(pictures, 1):
        address = html.escape(f"gradio_api/file={quote(str(picture.shown))}")
        label = html.escape(f"Picture {number}: {picture.file.name}")
        image = f'<img src="{address}" alt="{label}" title="{label}">'
        links.append(f'<a href="{address}" target="_blank" rel="noopener">{image}</a>')
    return f'<div class="pictures">{"".join(links)}</div>'


def answer_markdown(turn: ChatTurn) -> str:
    """The answer, the reason why there is none, or a sign that it is being written."""
    if turn.is_open and not turn.answer:
        return QUEUED if turn.is_queued else THINKING
    if turn.problem:
        text = turn.problem[0].upper() + turn.problem[1:]
        lines = html.escape(text).replace("\n", "<br>")
        return f'<div class="problem"><strong>No answer.</strong> {lines}</div>'
    notes = {"stopped": "stopped", "length": "cut off: raise “Longest answer” for more"}
    note = f'<div class="note">{notes[turn.finish_reason]}</div>' if turn.finish_reason in notes else ""
    return f"{close_code(turn.answer)}\n\n{note}".strip() if note else turn.answer


def close_code(markdown: str) -> str:
    """The text with its last code block closed, so that text after it is not shown as code."""
    opened: re.Match[str] | None = None
    for line in markdown.splitlines():
        fence = FENCE.fullmatch(line)
        if fence and opened is None and not ("`" in fence[2] and "`" in fence[3]):
            opened = fence
        elif fence and opened and fence[2].startswith(opened[2]) and not fence[3].strip():
            opened = None
    return f"{markdown}\n{re.sub('[^>]', ' ', opened[1])}{opened[2]}" if opened else markdown


def read_pictures(
    files: Sequence[str], read: Callable[[Path], ChatPicture]
) -> tuple[list[ChatPicture], list[Path], list[str]]:
    """(pictures of a message, files that may stay attached, an error text for each unusable file)."""
    paths = [Path(file) for file in files]
    if len(paths) > MAX_PICTURES:
        return [], paths, [f"{len(files)} pictures are attached, one message takes up to {MAX_PICTURES}; remove some"]
    pictures: list[ChatPicture] = []
    problems: list[str] = []
    for path in paths:
        try:
            pictures.append(read(path))
        except ImageError as error:
            problems.append(str(error).replace(str(path), path.name))
    return pictures, [picture.file for picture in pictures], problems


@dataclass
class Session:
    """The conversation of one tab. Setting `stop` ends the answer that is being written."""

    turns: list[ChatTurn] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    files: set[Path] = field(default_factory=set)

    def interrupt(self) -> None:
        """Stops the answer that is being written; a turn that is still queued counts as stopped."""
        self.stop.set()
        self.stop = threading.Event()
        for turn in self.turns:
            if turn.is_open:
                turn.finish_reason = "stopped"

    def ask(self, text: str, pictures: Iterable[ChatPicture]) -> None:
        self.interrupt()
        self.turns.append(ChatTurn(text.strip(), tuple(pictures)))
        for picture in self.turns[-1].pictures:
            self.files |= {picture.file, picture.shown}

    def ask_again(self, number: int, text: str | None = None) -> None:
        """Asks a turn again, with `text` as its question if given, and deletes the turns after it."""
        self.interrupt()
        old = self.turns[number]
        self.turns[number:] = [ChatTurn(old.text if text is None else text.strip(), old.pictures)]

    def take_back(self) -> ChatTurn | None:
        """Removes the last turn and returns it."""
        self.interrupt()
        return self.turns.pop() if self.turns else None

    def clear(self) -> None:
        self.interrupt()
        self.turns = []

    @property
    def open_turn(self) -> ChatTurn | None:
        return self.turns[-1] if self.turns and self.turns[-1].is_open else None


class Sessions:
    """The sessions of all open tabs, by the secret key in each tab's requests. No tab sees another's session."""

    def __init__(self, shared: Path):
        self.shared = shared  # pictures in this folder belong to all tabs
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, key: str) -> Session:
        with self._lock:
            return self._sessions.setdefault(key, Session())

    def close(self, key: str) -> None:
        """Stops a tab's answer and deletes its files, except those that another tab uses too."""
        with self._lock:
            session = self._sessions.pop(key, None)
            if session is None:
                return
            session.interrupt()
            elsewhere = {path for other in self._sessions.values() for path in other.files}
        for path in session.files - elsewhere:
            if not path.is_relative_to(self.shared):
                path.unlink(missing_ok=True)

    def close_all(self) -> None:
        for key in list(self._sessions):
            self.close(key)
