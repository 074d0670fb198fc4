"""Serves the page of one model to this computer only. The page's files are in a private folder, deleted at the end."""

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
# With this policy the browser refuses every request to another computer.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'"
)


def free_port(first: int) -> int:
    """The first free port of NUM_PORTS_TRIED from `first` on. Raises OSError if all are taken."""
    for port in range(first, min(first + NUM_PORTS_TRIED, 65_536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {first} and {first + NUM_PORTS_TRIED - 1}; choose another with --port")


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for Gradio's files that only this user can read. It is deleted when the block ends."""
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
    """ASGI middleware that adds CONTENT_POLICY to every response."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", CONTENT_POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass(frozen=True)
class ServedPage:
    """A page that is being served, and what it uses."""

    address: str
    engine: Engine
    sessions: Sessions
    folder: Path


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Imports create millions of permanent objects; collecting garbage among them takes a tenth of the loading time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # later collections leave these objects out too
        gc.enable()


@contextmanager
def serving(model: str | Path, *, port: int = DEFAULT_PORT, dtype: str | None = None) -> Iterator[ServedPage]:
    """Loads the model and serves its page until the block ends. Raises MmllmError where the model cannot be used."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    with private_folder() as folder:
        from mmllm.inference.engine import Engine

        engine = Engine.load(model, dtype=dtype)  # before Gradio is imported: a wrong model is reported sooner

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
            # requests under another host name are refused, against DNS rebinding
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                    Middleware(ContentPolicy),
                ]
            },
        )
        try:
            yield ServedPage(address, engine, sessions, folder)
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
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell script starts background jobs with it ignored
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
