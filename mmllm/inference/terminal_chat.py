"""`mmllm chat`: one question from the command line, or a conversation in the terminal.

Answers go to stdout, notes and errors to stderr. Where stdin is not a terminal, each line is a question or a command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from mmllm.batch import ImageSource
from mmllm.chat.conversation import Conversation
from mmllm.errors import MmllmError
from mmllm.images import ImageError
from mmllm.inference.engine import Engine, Reply
from mmllm.inference.sampling import Sampling
from mmllm.paths import expand_path

HELP = """\
/image FILE ...  show pictures; they belong to your next question
/undo            take back the last picture, or the last question and its answer
/clear           begin a new conversation
/help            this list
/quit            end; Ctrl-D does the same
Ctrl-C while the model answers stops the answer."""
COMMANDS = ("/image", "/undo", "/clear", "/help", "/quit")
UNFINISHED_CHARACTER = "\ufffd"  # decoded from bytes of a character that the next token may complete
# Control characters move the cursor or recolor a terminal, and a model can be made to write them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def ask_once(engine: Engine, prompt: str, images: list[Path], sampling: Sampling, *, as_json: bool) -> None:
    """Prints the answer to one question; with `as_json` one object with the answer, its counts and its seconds."""
    reply = engine.reply(Conversation(label=engine.picture_label).ask(prompt, [str(path) for path in images]), sampling)
    if as_json:
        values = dataclasses.asdict(reply)
        values = {"text": values.pop("text"), "finish": values.pop("finish_reason"), **values}
        for name in ("logprobs", "others"):  # only where they are asked for
            if not values[name]:
                del values[name]
        print(json.dumps({**values, "model": engine.name}))
        return
    print(printable(reply.text))
    for number, picture in enumerate(reply.pictures, 1):
        if picture.warning:
            print(f"(picture {number}: {picture.warning})", file=sys.stderr)
    if reply.finish_reason == "length":
        print(f"({_speed(reply)})", file=sys.stderr)


def talk(engine: Engine, images: list[Path], sampling: Sampling) -> None:
    """Chats until the end of input or /quit. `images` belong to the first question. Raises ImageError."""
    Terminal(engine, sampling, [engine.prepare(path) for path in images]).run()


def printable(text: str) -> str:
    """The text without the control characters of a terminal."""
    return _CONTROLS.sub("", text)


def _speed(reply: Reply) -> str:
    """Length and speed of a reply, and why it ended early."""
    speed = reply.num_new_tokens / reply.seconds if reply.seconds > 0 else 0.0
    text = f"{reply.num_new_tokens} tokens, {speed:.1f} a second"
    if reply.finish_reason == "length":
        text += "; cut off: --max-new-tokens allows longer answers"
    return text + ("; stopped" if reply.finish_reason == "stopped" else "")


@contextlib.contextmanager
def _stopped_by_ctrl_c(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `stop`; a second Ctrl-C before the block has ended raises KeyboardInterrupt as usual."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Terminal:
    """One chat. A picture is read once, when it is shown; later changes of its file do not change earlier turns."""

    def __init__(self, engine: Engine, sampling: Sampling, pictures: list[ImageSource]):
        self.engine, self.sampling = engine, sampling
        self.conversation = Conversation(label=engine.picture_label)
        self.waiting = pictures  # for the next question
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.out = Console(markup=False, highlight=False, emoji=False)
        self.notes = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def run(self) -> None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 must not end the chat
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() its history and line editing
            self.notes.print(f"Talking to {self.engine.name}. /image FILE shows a picture, /help lists the rest.")
        while True:
            try:
                line = self._read()
                if line is None or not self.take(line):
                    return
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                self.notes.print("\nCtrl-D or /quit ends the chat")

    def _read(self) -> str | None:
        try:
            return input("> " if self.is_terminal else "").strip()
        except EOFError:
            if self.is_terminal:
                self.out.print()
            return None

    def take(self, line: str) -> bool:
        """Answers a question or runs a command; False at /quit."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/image":
            self._show(rest.strip())
        elif command == "/undo":
            self._undo()
        elif command == "/clear":
            self.conversation.clear()
            self.waiting = []
            self.notes.print("a new conversation")
        elif command == "/help":
            self.notes.print(HELP)
        elif line.startswith("/"):
            self._error(f"no command {command}; there are {', '.join(COMMANDS)}")
        elif line:
            self._answer(line)
        return True

    def _error(self, text: object) -> None:
        self.notes.print(f"error: {printable(str(text))}", style="red")

    def _show(self, text: str) -> None:
        if not text:
            self._error("/image needs the path of a picture")
            return
        try:
            paths = _paths(text)
        except MmllmError as error:
            self._error(error)
            return
        for path in paths:
            try:
                picture = self.engine.prepare(path)
            except ImageError as error:
                self._error(error)
                continue
            self.waiting.append(picture)
            height, width = picture.size
            self.notes.print(f"picture {len(self.waiting)}: {path} ({width} x {height}); now ask about it")

    def _undo(self) -> None:
        if self.waiting:
            self.waiting.pop()
            self.notes.print(f"took back a picture; {len(self.waiting)} left for the next question")
        elif turn := self.conversation.take_back():
            self.waiting = list(turn.pictures)
            pictures = f" Its {len(self.waiting)} pictures wait for the next question." if self.waiting else ""
            self.notes.print(f"took back: {turn.question}{pictures}")
        else:
            self.notes.print("there is nothing to take back")

    def _answer(self, question: str) -> None:
        stop = threading.Event()
        try:
            example = self.conversation.ask(question, self.waiting)
            with _stopped_by_ctrl_c(stop):
                reply = self.write(self.engine.stream(example, self.sampling, stop=stop))
        except (MmllmError, torch.OutOfMemoryError) as error:
            self._error(error)
            return
        if self.is_terminal or reply.finish_reason == "length":
            self.notes.print(f"({_speed(reply)})", style="dim")
        if reply.text:
            self.conversation.add(question, self.waiting, reply.text)
            self.waiting = []
        else:
            self.notes.print("no answer; the question is not kept")

    def write(self, replies: Iterator[Reply]) -> Reply:
        """Prints an answer as it grows, and returns the whole reply."""
        shown = ""
        status = self.out.status("looking" if self.waiting else "thinking")
        if self.is_terminal:
            status.start()
        try:
            for reply in replies:
                text = reply.text if reply.finish_reason else reply.text.rstrip(UNFINISHED_CHARACTER)
                text = printable(text)
                if text.startswith(shown) and text != shown:
                    status.stop()
                    self.out.out(text[len(shown) :], end="", highlight=False)
                    shown = text
        finally:
            status.stop()
        if text != shown:  # a later token can change the text before it; then the whole answer is printed again
            self.out.out(f"\n{text}", end="", highlight=False)
        self.out.out()
        return reply


def _paths(text: str) -> list[str]:
    """The text as one path where such a file exists, else several paths, quoted as in a shell."""
    if Path(expand_path(text)).exists():
        return [expand_path(text)]
    try:
        words = shlex.split(text)
    except ValueError:  # an opening quote without a closing one
        words = [text]
    return [expand_path(word) for word in words]
