"""`mmllm caption`: one JSON line a picture, in batches. A job that was killed goes on where it stopped.

The output file is its own ledger: a picture with a line in it, by its path as written, is done. The file is locked
while a job writes it, and flushed after each batch.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmllm.batch import Example
from mmllm.data.images import ImageError, load_image
from mmllm.inference.conversation import user_message
from mmllm.inference.engine import Engine, Reply, Sampling
from mmllm.model.checkpoint import MANIFEST, file_hash, read_manifest

# By these a picture is recognised in a folder; what it is, its content says. See FORMATS of mmllm.data.images.
# fmt: off
SUFFIXES = (
    ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".j2k", ".jpe", ".jpeg", ".jpg", ".jpx", ".mpo", ".pbm", ".pgm",
    ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)
# fmt: on
NUM_READERS = 4  # threads that decode the next batch
SECONDS_BETWEEN_LINES = 10.0
LINE_START = b'{"image": '


def find_pictures(inputs: Sequence[Path]) -> tuple[list[str], dict[str, str]]:
    """(paths of pictures, sorted, each once; folders that cannot be searched, with the reason).

    Folders are searched all the way down for SUFFIXES; links to other folders are not followed. What is given by name
    and is no folder counts as a picture.
    """
    found: set[str] = set()
    closed: dict[str, str] = {}

    def remember(error: OSError) -> None:
        closed[str(error.filename)] = f"{error.filename} cannot be searched ({error.strerror}); check its rights"

    for given in inputs:
        if not given.is_dir():
            found.add(str(given))
        for folder, _, names in os.walk(given, onerror=remember) if given.is_dir() else ():
            found |= {str(Path(folder, name)) for name in names if name.lower().endswith(SUFFIXES)}
    return sorted(found), closed


class Ledger:
    """The output file: which pictures have a line already, and new lines behind them. Raises ValueError if in use."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():
            raise ValueError(f"--out {path} is a folder or a device; give the path of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self.done: dict[str, tuple[str, str]] = {}  # picture -> (hash of the model, prompt)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another run writes {path} now; wait for its end, or give another --out") from None
        except ValueError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        position = 0
        for number, line in enumerate(self._file, 1):
            record = _record(line)
            if record is not None:
                self.done[record["image"]] = (str(record.get("model_hash")), str(record.get("prompt")))
            elif not line.endswith(b"\n") and (line.startswith(LINE_START) or LINE_START.startswith(line)):
                self._file.truncate(position)  # half a line: the run that wrote it was killed
                break
            elif line.strip():
                raise ValueError(
                    f"{self.path} line {number} is not a caption as this command writes it; mend or remove the line, "
                    "or give another --out"
                )
            position += len(line)
            if not line.endswith(b"\n"):
                self._file.write(b"\n")
                self._file.flush()

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_caption = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("image", "caption"))
    return record if is_caption else None


class _Progress:
    """A bar on a terminal; elsewhere a line every few seconds. Both go to stderr, as do the failures."""

    def __init__(self, total: int):
        self.total, self.num_done, self.begun = total, 0, time.monotonic()
        self._said = self.begun
        self.console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        columns = (TextColumn("captioning"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self.bar = Progress(
            *columns, TimeRemainingColumn(), console=self.console, transient=True, disable=not self.console.is_terminal
        )
        self._task = self.bar.add_task("", total=total, rate="")

    def advance(self, count: int) -> None:
        self.num_done += count
        now = time.monotonic()
        rate = f"{self.num_done / max(now - self.begun, 1e-9):.1f} a second"
        self.bar.update(self._task, advance=count, rate=rate)
        if not self.console.is_terminal and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            self.say(f"{self.num_done} of {self.total} pictures, {rate}")

    def say(self, text: str) -> None:
        self.console.print(text)


class _Failures:
    """What could not be captioned this time: said at once, and listed beside the captions."""

    def __init__(self, out: Path, progress: _Progress):
        self.path = out.with_name(f"{out.name}.failed.jsonl")
        self._progress = progress
        self.count = 0
        self.path.unlink(missing_ok=True)

    def add(self, image: str, reason: str) -> None:
        self._progress.say(f"failed: {reason}")
        self.count += 1
        with self.path.open("a") as file:
            file.write(json.dumps({"image": image, "error": reason}) + "\n")


def caption_pictures(
    model: Path,
    inputs: list[Path],
    out: Path,
    *,
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
    device: str | None,
    dtype: str | None = None,
) -> int:
    """Captions every picture that has no line in `out` yet; returns how many could not be captioned.

    Raises ValueError where there are no pictures, no model, or another run writes the same file.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; say what the model is asked for each picture")
    read_manifest(model)  # a wrong path is told before anything is searched or written
    pictures, closed = find_pictures(inputs)
    if not pictures and not closed:
        searched = ", ".join(map(str, inputs))
        raise ValueError(f"no pictures in {searched}; searched for files that end in {' '.join(SUFFIXES)}")
    stamp = {"model": model.resolve().name, "model_hash": file_hash(model / MANIFEST)[:16], "prompt": prompt}
    with Ledger(out) as ledger:
        todo = [path for path in pictures if path not in ledger.done]
        _say_what_is_done(ledger, pictures, todo, stamp)
        engine = Engine.load(model, device=device, dtype=dtype) if todo else None
        progress = _Progress(len(todo))
        failures = _Failures(out, progress)
        for folder, reason in closed.items():
            failures.add(folder, reason)
        if engine is not None:
            job = _Job(engine, ledger, failures, progress, stamp)
            with progress.bar:
                job.run(todo, batch_size, Sampling(max_new_tokens=max_new_tokens))
            print(job.summary(out))
    if failures.count:
        print(f"{failures.count} failed: {failures.path} lists them, and the next run tries them again")
    return failures.count


def _say_what_is_done(ledger: Ledger, pictures: list[str], todo: list[str], stamp: dict[str, str]) -> None:
    done = [ledger.done[path] for path in pictures if path in ledger.done]
    if not done:
        return
    others = sum(pair != (stamp["model_hash"], stamp["prompt"]) for pair in done)
    by_others = f" ({others} of them by another model or prompt)" if others else ""
    print(
        f"{len(done)} of {len(pictures)} pictures have a caption in {ledger.path} already{by_others}; {len(todo)} left"
    )


class _Job:
    """Batches of pictures through the model, into the ledger."""

    def __init__(self, engine: Engine, ledger: Ledger, failures: _Failures, progress: _Progress, stamp: dict[str, str]):
        self.engine, self.ledger, self.failures, self.progress, self.stamp = engine, ledger, failures, progress, stamp
        self.finishes: dict[str, int] = {}

    def run(self, paths: Sequence[str], batch_size: int, sampling: Sampling) -> None:
        message = user_message(self.stamp["prompt"], 1)
        for batch in _decoded(paths, batch_size):
            good = [(path, picture) for path, picture in batch if isinstance(picture, Image.Image)]
            examples = [Example(path, "caption", (message,), (picture,)) for path, picture in good]
            replies = self._replies(examples, sampling)
            records = [
                self._line(example.id, reply)
                for example, reply in zip(examples, replies, strict=True)
                if isinstance(reply, Reply)
            ]
            self.ledger.append(records)
            for path, reason in [*batch, *((e.id, r) for e, r in zip(examples, replies, strict=True))]:
                if isinstance(reason, Exception):
                    self.failures.add(path, str(reason))
            self.progress.advance(len(batch))

    def _replies(self, examples: Sequence[Example], sampling: Sampling) -> list[Reply | Exception]:
        """The reply to each, or why there is none: where a batch fails, its pictures are tried one by one.

        Raises the error where no picture of the job came through, for then it is not about one picture.
        """
        try:
            return [*self.engine.reply_batch(examples, sampling)]
        except (ValueError, RuntimeError) as error:
            if len(examples) == 1 and self.finishes:
                return [error]
            if len(examples) == 1:
                raise
            self.progress.say(f"a batch of {len(examples)} failed, so its pictures follow one by one: {error}")
        replies: list[Reply | Exception] = []
        for example in examples:
            try:
                replies += self.engine.reply_batch([example], sampling)
            except (ValueError, RuntimeError) as error:
                replies.append(error)
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if len(failed) == len(examples) and not self.finishes:
            raise failed[0]
        return replies

    def _line(self, path: str, reply: Reply) -> dict[str, Any]:
        """What is kept of a reply. One without words, or cut off, is marked by its `finish`."""
        finish = reply.finish if reply.text else "empty"
        self.finishes[str(finish)] = self.finishes.get(str(finish), 0) + 1
        counts = {"finish": finish, "num_new_tokens": reply.num_new_tokens}
        return {"image": path, "caption": reply.text, **self.stamp, **counts}

    def summary(self, out: Path) -> str:
        text = f"{sum(self.finishes.values())} pictures captioned in {out}"
        marks = {"length": "cut off; --max-new-tokens allows more", "empty": "without words"}
        for finish, meaning in marks.items():
            if count := self.finishes.get(finish):
                text += f'\n{count} of them with "finish": "{finish}" ({meaning})'
        return text


def _load(path: str) -> Image.Image | ImageError:
    try:
        return load_image(path)
    except ImageError as error:
        return error


def _decoded(paths: Sequence[str], batch_size: int) -> Iterator[list[tuple[str, Image.Image | ImageError]]]:
    """Batches of (path, picture or why there is none); the next batch is read while the last one is used."""
    waiting: deque[list[tuple[str, Future[Image.Image | ImageError]]]] = deque()
    pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read")
    try:
        for start in range(0, len(paths), batch_size):
            waiting.append([(path, pool.submit(_load, path)) for path in paths[start : start + batch_size]])
            if len(waiting) > 1:
                yield [(path, future.result()) for path, future in waiting.popleft()]
        for batch in waiting:
            yield [(path, future.result()) for path, future in batch]
    finally:
        pool.shutdown(cancel_futures=True)
