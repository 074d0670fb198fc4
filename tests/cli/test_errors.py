"""What ends a command: one block for what a user or the machine did, a traceback for every other error.

A library's ValueError, KeyError or IndexError is a bug of ours, wherever it is raised, and is never dressed up.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmllm.errors import EXIT_FAILED, MmllmError
from tests.builders.launches import Forked, commanded, run_page
from tests.builders.tiny import red_picture

BUGS = {"ValueError": ValueError, "KeyError": KeyError, "IndexError": IndexError}
CAUSES = {"MmllmError": MmllmError, "OSError": functools.partial(OSError, 5)}
ERRORS = {**BUGS, **CAUSES}
TEXT = "put in by a test"


def fail(kind: str, *_: Any, **__: Any) -> Any:
    raise ERRORS[kind](TEXT)


def fail_instance(_: Any, kind: str, *__: Any, **___: Any) -> Any:
    return fail(kind)


def fail_in_backward(kind: str) -> None:
    """torch raises this error in the first training step."""
    import torch

    torch.Tensor.backward = functools.partialmethod(fail_instance, kind)  # type: ignore[method-assign]


def fail_in_cache(kind: str) -> None:
    """transformers raises this error when a question is answered, in the thread that runs the model."""
    from transformers.cache_utils import Cache

    Cache.update = functools.partialmethod(fail_instance, kind)


def fail_in_worker(kind: str) -> None:
    """torch raises this error where a process that prepares batches pads one; the main process goes on."""
    import torch
    from torch.utils.data import get_worker_info

    whole = torch.full

    def full(*given: Any, **options: Any) -> Any:
        return whole(*given, **options) if get_worker_info() is None else fail(kind)

    torch.full = full


def fail_in_launch(kind: str) -> None:
    """Gradio raises this error as the page starts to be served."""
    import gradio

    gradio.Blocks.launch = functools.partialmethod(fail_instance, kind)


def train(tiny_runs: Path, out: Path, before: Callable[[], None], *overrides: str) -> subprocess.CompletedProcess[str]:
    return commanded("train", tiny_runs / "stage2.yaml", f"out={out}", *overrides, before=before)


def run(command: str, kind: str, runs: Path, model: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The real command, with this error at the deepest place where it calls a library."""
    if command == "train":
        return train(runs, folder / "out", functools.partial(fail_in_backward, kind))
    if command == "a data worker of train":
        return train(runs, folder / "out", functools.partial(fail_in_worker, kind), "data.num_workers=1")
    if command == "the page":
        with Forked(run_page, [model], name="demo", before=functools.partial(fail_in_launch, kind)) as process:
            return process.completed()
    answers = functools.partial(fail_in_cache, kind)
    if command == "caption":
        picture = red_picture(folder / "red.png", 40, 30)
        return commanded("caption", model, picture, "--out", folder / "captions.jsonl", before=answers)
    return commanded("chat", model, "--prompt", "what is it?", before=answers)


COMMANDS = ("train", "a data worker of train", "chat", "caption", "the page")


@pytest.mark.parametrize("kind", BUGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bug_keeps_its_traceback(
    command: str, kind: str, tiny_runs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = run(command, kind, tiny_runs, tiny_checkpoint, tmp_path)
    assert done.returncode == EXIT_FAILED, done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert "in fail\n" in done.stderr, "the place where it was raised"
    assert kind in done.stderr
    assert TEXT in done.stderr
    assert "error:" not in done.stderr


@pytest.mark.parametrize("kind", CAUSES)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_user_or_the_machine_did_is_one_block(
    command: str, kind: str, tiny_runs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = run(command, kind, tiny_runs, tiny_checkpoint, tmp_path)
    assert done.returncode == EXIT_FAILED, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert TEXT in done.stderr


def test_a_command_whose_reader_has_left_ends_without_a_word() -> None:
    """As in `mmllm configs | head -1`."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "mmllm.cli", "configs"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (EXIT_FAILED, "")
