"""Processes as people and launchers start them, real ones or forked from a server that has the imports done.

The imports of torch, transformers and the rest are most of the time of a small run. A forked process has what a real
one has: its own arguments, folder, environment, standard streams and exit status, and all that runs at its end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIXED = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
STREAMS = {"out": 1, "err": 2}
POLL_SECONDS = 0.02
SLOW_IMPORTS = (
    "accelerate", "deepspeed", "gradio", "matplotlib.figure", "open_clip", "peft", "mmllm.evaluation.validation_tasks",
    "mmllm.inference.terminal_chat", "mmllm.stages.conversation", "mmllm.stages.plan", "mmllm.stages.registry",
    "mmllm.feature_cache.encoder", "mmllm.training.loop", "mmllm.training.lora",
)  # fmt: skip


@functools.cache
def forkserver() -> Any:
    """What starts processes from a server that has imported what is slow to import: one for all tests of a process."""
    context = multiprocessing.get_context("forkserver")
    # the server passes over what it cannot import, and all would only be slow
    assert [name for name in SLOW_IMPORTS if find_spec(name) is None] == []
    context.set_forkserver_preload(["tests.builders.slow_imports"])
    return context


def run_file(path: str) -> None:
    """As `python PATH`."""
    runpy.run_path(path, run_name="__main__")


def run_command() -> None:
    """As the installed command `mmllm`."""
    sys.exit(importlib.import_module("mmllm.cli").main())


def run_page() -> None:
    """As `python -m demo`."""
    runpy.run_module("demo", run_name="__main__", alter_sys=True)


class Forked:
    """A process that runs, or ran, with what it writes to its two streams in files, or on a terminal of its own.

    `before` is called first in the process: it puts a fault in, or says at which point the process kills itself.
    """

    def __init__(
        self, what: Callable[..., object], arguments: Sequence[object] = (), *, name: str = "mmllm",
        given: tuple[Any, ...] = (), environment: Mapping[str, str] | None = None, terminal: str | None = None,
        before: Callable[..., object] | None = None,
    ):  # fmt: skip
        self.arguments = [name, *map(str, arguments)]
        self.folder = tempfile.TemporaryDirectory()
        self.files = {stream: Path(self.folder.name) / stream for stream in STREAMS}
        streams = {STREAMS[stream]: str(terminal or path) for stream, path in self.files.items()}
        self.process = forkserver().Process(
            target=_run, args=(what, given, self.arguments, {**os.environ, **(environment or {})}, str(Path.cwd()),
                               streams, terminal is not None, before),
        )  # fmt: skip
        self.process.start()

    def read(self, stream: str = "out") -> str:
        """What it has written so far."""
        path = self.files[stream]
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, text: str, *, stream: str = "out", seconds: float = 120) -> str:
        """What it has written, when this text is in it."""
        end = time.monotonic() + seconds
        while text not in self.read(stream):
            assert self.poll() is None, f"ended with {self.poll()}:\n{self.read('out')}{self.read('err')}"
            assert time.monotonic() < end, f"waited in vain for {text!r}:\n{self.read('out')}{self.read('err')}"
            time.sleep(POLL_SECONDS)
        return self.read(stream)

    def poll(self) -> int | None:
        code = self.process.exitcode
        return None if code is None else int(code)

    def wait(self, seconds: float | None = None) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still there after {seconds} s"
        return int(self.process.exitcode)

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def completed(self) -> subprocess.CompletedProcess[str]:
        returncode = self.wait()
        return subprocess.CompletedProcess(self.arguments, returncode, self.read("out"), self.read("err"))

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *error: object) -> None:
        if self.poll() is None:
            self.process.kill()
            self.process.join()
        self.folder.cleanup()


def _run(
    what: Callable[..., object], given: tuple[Any, ...], arguments: list[str], environment: dict[str, str],
    folder: str, streams: dict[int, str], is_terminal: bool, before: Callable[..., object] | None,
) -> None:  # fmt: skip
    if is_terminal:
        os.login_tty(os.open(streams[1], os.O_RDWR))  # type: ignore[attr-defined]
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing has put /dev/null there
    else:
        for number, path in streams.items():
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=is_terminal or stream is sys.stderr)  # type: ignore[union-attr]
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a process that a command starts
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # found anew, by TMPDIR
    os.chdir(folder)
    sys.argv = arguments
    try:
        if before is not None:
            before()
        what(*given)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter's own, not multiprocessing's
        raise SystemExit(1) from error
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def command(*arguments: object, **options: Any) -> Forked:
    """`mmllm ARGUMENTS`, started; see `Forked` for the options."""
    return Forked(run_command, arguments, **options)


def commanded(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`mmllm ARGUMENTS`, when it has ended."""
    with command(*arguments, **options) as process:
        return process.completed()


def script(path: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python PATH ARGUMENTS`, when it has ended."""
    with Forked(run_file, arguments, name=str(path), given=(str(path),), **options) as process:
        return process.completed()


def under_torchrun(
    driver: Path, arguments: Sequence[object], num_processes: int, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The real launcher. Each process imports torch and the rest anew, which is most of its time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    return subprocess.run(
        [*command, driver, *map(str, arguments)], env={**os.environ, **FIXED, **(environment or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def forked(
    driver: Path, arguments: Sequence[object], num_processes: int, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The same processes with the same variables, from a server that has imported what is slow to import."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **FIXED, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes), **(environment or {}),
    }  # fmt: skip
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_driver(driver, arguments, rank)) for rank in ranks]
        done = [process.completed() for process in processes]
    returncode = next((one.returncode for one in done if one.returncode), 0)
    return subprocess.CompletedProcess(
        done[0].args, returncode, "".join(one.stdout for one in done), "".join(one.stderr for one in done)
    )


def forked_alone(driver: Path, arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """A process that no launcher started, as `forked`."""
    with _driver(driver, arguments, FIXED) as process:
        return process.completed()


def _driver(driver: Path, arguments: Sequence[object], environment: Mapping[str, str]) -> Forked:
    return Forked(run_file, arguments, name=str(driver), given=(str(driver),), environment=environment)


@contextlib.contextmanager
def pseudo_terminal() -> Iterator[tuple[int, str]]:
    """A terminal: the descriptor at which a person types and reads, and the name by which a process opens it."""
    ours, theirs = os.openpty()
    try:
        yield ours, os.ttyname(theirs)
    finally:
        os.close(theirs)
        os.close(ours)


def default_interrupts() -> None:
    """Ctrl-C is heard, which a shell's background jobs, such as the tests may be, ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
