"""Serves the page of one model: on this computer only, from a private folder that is deleted at the end."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demo.chat import Sessions
    from mmllm.inference.engine import Engine

HOST = "127.0.0.1"
DEFAULT_PORT = 7860
NUM_PORTS_TRIED = 100
TEMP_DIR = "GRADIO_TEMP_DIR"
# The browser itself refuses to ask any other computer for anything.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'"
)


def free_port(wanted: int) -> int:
    """This port, or the next one that nothing listens on. Raises OSError where none of the next ones is free."""
    for port in range(wanted, min(wanted + NUM_PORTS_TRIED, 65_536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {wanted} and {wanted + NUM_PORTS_TRIED - 1}; choose another with --port")


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user can read, told to Gradio, and deleted with all that was put into it."""
    folder = Path(tempfile.mkdtemp(prefix="mmllm-demo-")).resolve()
    before = os.environ.get(TEMP_DIR)
    os.environ[TEMP_DIR] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            os.environ.pop(TEMP_DIR)
        else:
            os.environ[TEMP_DIR] = before
        shutil.rmtree(folder, ignore_errors=True)


class ContentPolicy:
    """ASGI middleware that sends CONTENT_POLICY with every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", CONTENT_POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass(frozen=True)
class Served:
    """A page that is being served."""

    address: str
    engine: Engine
    sessions: Sessions
    folder: Path


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Loading libraries makes millions of objects that stay; looking for garbage among them takes a tenth of it."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor is it looked for among them later
        gc.enable()


@contextmanager
def serving(model: str | Path, *, port: int = DEFAULT_PORT, dtype: str | None = None) -> Iterator[Served]:
    """Loads the model and serves its page until the block ends. Raises ValueError where there is no usable model."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    with private_folder() as folder:
        from mmllm.inference.engine import Engine

        engine = Engine.load(
            model, dtype=dtype
        )  # before gradio is imported: what is wrong with the model is said at once

        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from demo.chat import MAX_FILE_SIZE, Sessions
        from demo.page import build_page
        from demo.theme import asset, build_theme

        sessions = Sessions(folder / "examples")
        page = build_page(engine, sessions, folder)
        page.queue(max_size=64)
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=free_port(port),
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            show_error=True,
            max_file_size=MAX_FILE_SIZE,
            theme=build_theme(),
            css=asset("page.css"),
            js=asset("page.js"),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            # a page of another name that leads here (DNS rebinding) is refused
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                    Middleware(ContentPolicy),
                ]
            },
        )
        try:
            yield Served(address, engine, sessions, folder)
        finally:
            sessions.close_all()
            page.close(verbose=False)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def launch(
    model: str | Path, *, port: int = DEFAULT_PORT, open_browser: bool = False, dtype: str | None = None
) -> None:
    """Serves the page of a model until Ctrl-C or SIGTERM."""
    print(f"loading {model}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a script's background job starts with it ignored
        signal.signal(number, _interrupt)
    with contextlib.ExitStack() as stack:
        with _without_garbage_collection():
            served = stack.enter_context(serving(model, port=port, dtype=dtype))
        try:
            if f":{port}" not in served.address:
                print(f"port {port} is taken, so the page is on the next free one", flush=True)
            print(f"{served.engine.name} answers at {served.address} (Ctrl-C ends)", flush=True)
            if open_browser:
                webbrowser.open(served.address)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nending", flush=True)
