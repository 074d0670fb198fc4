"""The page's event handlers. Each method handles one event: it takes the page's inputs and returns its outputs."""

from __future__ import annotations

import base64
import binascii
import functools
import html
import logging
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from demo.chat import (
    SHOWN_PX,
    ChatPicture,
    Session,
    Sessions,
    chatbot_messages,
    example_of,
    read_pictures,
    turn_of_message,
    typed_text,
)
from demo.examples import ExampleQuestion
from demo.preview import EMPTY_PREVIEW, counts_html, preview_html
from mmllm.batch import Example
from mmllm.chat.conversation import user_message
from mmllm.errors import MmllmError
from mmllm.images import ImageError, load_image
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling

logger = logging.getLogger(__name__)
ANY_SEED = -1
SECONDS_BETWEEN_UPDATES = 0.05
DRAWING_PREFIX = "data:image/png;base64,"
MAX_DRAWING_LENGTH = 8_000_000


def notice_html(problems: list[str]) -> str:
    """The problems of a message that was not sent; empty without problems."""
    items = "".join(f"<p>{html.escape(problem)}.</p>" for problem in problems)
    return f'<div class="notice" role="alert">{items}</div>' if problems else ""


class Events:
    """The event handlers of one page. The state of each tab is in `sessions`."""

    def __init__(self, engine: Engine, sessions: Sessions, examples: list[ExampleQuestion], folder: Path):
        self.engine = engine
        self.sessions = sessions
        self.examples = examples
        self.folder = folder

    def _session(self, request: gr.Request) -> Session:
        return self.sessions.of(str(request.session_hash))

    def send(self, message: dict[str, Any] | None, request: gr.Request) -> tuple[Any, Any, str]:
        """(composer, chat, notice): asks the message, or says what is wrong with it and leaves it in the composer."""
        text, files = (message or {}).get("text") or "", (message or {}).get("files") or []
        session = self._session(request)
        pictures, paths, problems = read_pictures(files, functools.partial(self._read, session))
        problems += self._text_problems(text)
        if problems:
            return {"text": text, "files": [str(path) for path in paths]}, gr.skip(), notice_html(problems)
        session.ask(text, pictures)
        return {"text": "", "files": []}, chatbot_messages(session.turns), ""

    def _text_problems(self, text: str) -> list[str]:
        """Why this text cannot be a question. It is refused here, before it breaks every later prompt of the chat."""
        if not text.strip():
            return ["There is no question yet; type one, then send"]
        try:
            self.engine.renderer.render_example(Example("question", "demo", (user_message(text.strip(), 0),)))
        except MmllmError as error:
            return [f"This question cannot be asked: {error}"]
        return []

    def _read(self, session: Session, path: Path) -> ChatPicture:
        """Decodes a picture once, for model and chat. The chat gets a PNG or JPEG, since browsers show no HEIC."""
        image, picture = self.engine.prepare_shown(path, SHOWN_PX)
        shown = self.folder / uuid.uuid4().hex / f"{path.stem}.{'png' if max(picture.size) < SHOWN_PX else 'jpg'}"
        shown.parent.mkdir(parents=True)
        picture.save(shown, quality=90)
        session.files |= {path, shown}
        return ChatPicture(path, shown, image)

    def answer(
        self, temperature: float, top_p: float, max_new_tokens: int, seed: int, request: gr.Request
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Yields (composer, chat, preview, counts) while the open turn is answered; no change if no turn is open."""
        session = self._session(request)
        stop = session.stop  # read before the turn, so that whatever closes this turn sets this event
        turn = session.open_turn
        if turn is None:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
            return
        turn.is_queued = False
        yield composer_while(writing=True), chatbot_messages(session.turns), gr.skip(), counts_html(None)
        try:
            sampling = Sampling(temperature, top_p, int(max_new_tokens), None if seed == ANY_SEED else seed)
            example = example_of(session.turns[: session.turns.index(turn) + 1], label=self.engine.picture_label)
            yield gr.skip(), gr.skip(), preview_html(self.engine, example), gr.skip()
            last_update = 0.0
            for reply in self.engine.stream(example, sampling, stop=stop):
                turn.answer = reply.text
                if reply.finish_reason is None and time.monotonic() - last_update < SECONDS_BETWEEN_UPDATES:
                    continue
                turn.finish_reason = turn.finish_reason or reply.finish_reason
                yield gr.skip(), chatbot_messages(session.turns), gr.skip(), counts_html(reply)
                last_update = time.monotonic()
        except (MmllmError, RuntimeError) as error:  # torch raises RuntimeError where memory runs out
            logger.warning("no answer: %s", error, exc_info=not isinstance(error, MmllmError))
            turn.problem = str(error)
            yield gr.skip(), chatbot_messages(session.turns), gr.skip(), gr.skip()
        finally:
            stop.set()  # the tab may have been closed meanwhile
            if turn.is_open:
                turn.finish_reason = "stopped"

    def reset_composer(self, request: gr.Request) -> Any:
        """The composer after an answer: ready to send, unless the next answer is being written already."""
        return composer_while(writing=self._session(request).open_turn is not None)

    def stop(self, request: gr.Request) -> tuple[Any, list[dict[str, Any]]]:
        """(composer, chat): stops the answer that is being written."""
        session = self._session(request)
        session.interrupt()
        return composer_while(writing=False), chatbot_messages(session.turns)

    def retry(self, request: gr.Request) -> tuple[list[dict[str, Any]], str]:
        """(chat, notice): asks the last question again."""
        session = self._session(request)
        if session.turns:
            session.ask_again(len(session.turns) - 1)
        return chatbot_messages(session.turns), ""

    def undo(self, request: gr.Request) -> tuple[Any, list[dict[str, Any]], str]:
        """(composer, chat, notice): moves the last question from the chat back to the composer."""
        session = self._session(request)
        turn = session.take_back()
        draft = {"text": turn.text, "files": [str(picture.file) for picture in turn.pictures]} if turn else gr.skip()
        return draft, chatbot_messages(session.turns), ""

    def edit(self, edited: gr.EditData, request: gr.Request) -> tuple[list[dict[str, Any]], str]:
        """(chat, notice): asks a turn again with other words, and deletes the turns after it."""
        session = self._session(request)
        index = edited.index if isinstance(edited.index, int) else edited.index[0]
        text = typed_text(str(edited.value))
        if problems := self._text_problems(text):
            return chatbot_messages(session.turns), notice_html(
                [f"{problem}. The old question stays" for problem in problems]
            )
        if index < len(chatbot_messages(session.turns)):
            session.ask_again(turn_of_message(session.turns, index), text)
        return chatbot_messages(session.turns), ""

    def clear(self, request: gr.Request) -> tuple[list[dict[str, Any]], str, str, str]:
        """(chat, preview, counts, notice) of a new conversation."""
        self._session(request).clear()
        return [], EMPTY_PREVIEW, counts_html(None), ""

    def ask_example(self, chosen: gr.SelectData, request: gr.Request) -> tuple[list[dict[str, Any]], str]:
        """(chat, notice): asks one of the examples."""
        session = self._session(request)
        example = self.examples[int(chosen.index)]
        pictures = [ChatPicture(path, path, self.engine.prepare(path)) for path in example.pictures]
        session.ask(example.question, pictures)
        return chatbot_messages(session.turns), ""

    def attach_drawing(
        self, drawn: gr.EventData, message: dict[str, Any] | None, request: gr.Request
    ) -> tuple[Any, str]:
        """(composer, notice): adds the drawing to the pictures of the message that is being typed."""
        try:
            path = self._save_drawing(getattr(drawn, "picture", None), self._session(request))
        except ImageError as error:
            return gr.skip(), notice_html([f"The drawing cannot be used: {error}"])
        files = (message or {}).get("files") or []
        return {"text": (message or {}).get("text") or "", "files": [*files, str(path)]}, ""

    def _save_drawing(self, address: Any, session: Session) -> Path:
        if not isinstance(address, str) or not address.startswith(DRAWING_PREFIX):
            raise ImageError("the page did not send a PNG picture; reload the page and draw again")
        if len(address) > MAX_DRAWING_LENGTH:
            raise ImageError(f"it has more than {MAX_DRAWING_LENGTH:,} characters; draw less")
        try:
            picture = load_image(base64.b64decode(address.removeprefix(DRAWING_PREFIX), validate=True))
        except binascii.Error as error:
            raise ImageError(f"the page sent it damaged ({error}); draw again") from error
        path = self.folder / uuid.uuid4().hex / "drawing.png"
        path.parent.mkdir(parents=True)
        picture.save(path)
        session.files.add(path)
        return path

    def leave(self, request: gr.Request) -> None:
        """The tab was closed: stops its answer and deletes its pictures."""
        self.sessions.close(str(request.session_hash))


def composer_while(*, writing: bool) -> Any:
    """The composer with the button Stop while an answer is written, else Send. Its text and pictures stay."""
    return gr.update(submit_btn=False if writing else "Send", stop_btn="Stop" if writing else False)
