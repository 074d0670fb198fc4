"""`mmllm caption`: one JSON line a picture, in batches. A job that was killed goes on where it stopped.

The output file is its own ledger: a picture with a line in it, by its path as written, is done. The file is locked
while a job writes it, and flushed after each batch. A caption that was cut off is marked, and replaced by a job that
allows a longer one.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmllm.batch import Example, PreparedImage
from mmllm.chat.conversation import user_message
from mmllm.checkpoint.folder import MANIFEST, file_hash, read_manifest
from mmllm.errors import MmllmError
from mmllm.images import ImageError
from mmllm.inference.engine import Engine, Reply, Sampling
from mmllm.locks import lock_file, no_locks_warning
from mmllm.readers.folders import PICTURE_ENDINGS, classify_files, describe_passed_over

NUM_READERS = 4  # threads that decode the next batch
SECONDS_BETWEEN_LINES = 10.0
LINE_START = b'{"image": '


@dataclass
class FoundPictures:
    """What a job was given: pictures, sorted, each once, and what of it is none."""

    paths: list[str]
    failed: dict[str, str]  # folders that cannot be searched, and pictures of a kind that is not read, with the reason
    passed_over: Counter[str]  # other files; reason: how many


def find_pictures(inputs: Sequence[Path]) -> FoundPictures:
    """Folders are searched all the way down; links to other folders are not followed.

    What is given by name and is no folder counts as a picture.
    """
    paths: set[str] = set()
    failed: dict[str, str] = {}
    passed_over: Counter[str] = Counter()

    def remember(error: OSError) -> None:
        failed[str(error.filename)] = f"{error.filename} cannot be searched ({error.strerror}); check its rights"

    for given in dict.fromkeys(inputs):
        if not given.is_dir():
            paths.add(str(given))
            continue
        walked = os.walk(given, onerror=remember)
        names = [str(Path(folder, name).relative_to(given)) for folder, _, names in walked for name in names]
        files = classify_files(names)
        paths |= {str(given / name) for name in files.pictures}
        failed |= {str(given / name): f"{given / name} is {reason}" for name, reason in files.unread.items()}
        passed_over += files.passed_over
    return FoundPictures(sorted(paths), failed, passed_over)


@dataclass(frozen=True)
class DoneCaption:
    """What a line of the ledger says of how a caption was made; `cut_at` is None for one that came to its end."""

    model_hash: str
    prompt: str
    cut_at: int | None  # the tokens that were allowed

    def is_of(self, stamp: Mapping[str, str]) -> bool:
        """Whether the same model was asked the same."""
        return (self.model_hash, self.prompt) == (stamp["model_hash"], stamp["prompt"])


class Ledger:
    """The output file: which pictures have a line already, and new lines behind them. Raises MmllmError if in use."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():
            raise MmllmError(f"--out {path} is a folder or a device; give the path of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self.done: dict[str, DoneCaption] = {}  # by picture; of several lines of one picture the last counts
        self._has_replaced = False
        try:
            outcome = lock_file(self._file)
            if outcome == "taken":
                raise MmllmError(f"another run writes {path} now; wait for its end, or give another --out")
            if outcome == "none":
                print(no_locks_warning(path), flush=True)
            self._read()
        except (ValueError, OSError):
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
                self._remember(record)
            elif not line.endswith(b"\n") and (line.startswith(LINE_START) or LINE_START.startswith(line)):
                self._file.truncate(position)  # half a line: the run that wrote it was killed
                break
            elif line.strip():
                raise MmllmError(
                    f"{self.path} line {number} is not a caption as this command writes it; mend or remove the line, "
                    "or give another --out"
                )
            position += len(line)
            if not line.endswith(b"\n"):
                self._file.write(b"\n")
                self._file.flush()

    def _remember(self, record: Mapping[str, Any]) -> None:
        self._has_replaced |= record["image"] in self.done
        limit = record.get("max_new_tokens", record.get("num_new_tokens"))
        cut_at = (limit if isinstance(limit, int) else 0) if record.get("finish") == "length" else None
        self.done[record["image"]] = DoneCaption(str(record.get("model_hash")), str(record.get("prompt")), cut_at)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()
        for record in records:
            self._remember(record)

    def drop_replaced(self) -> None:
        """Leaves one line a picture, its last, where captions were written anew; killed in between, both stay."""
        if not self._has_replaced:
            return
        self._file.seek(0)
        lines = {(_record(line) or {}).get("image"): line for line in self._file}
        partial = self.path.with_name(f"{self.path.name}.part")
        partial.write_bytes(b"".join(lines.values()))
        partial.replace(self.path)
        self._has_replaced = False


def read_captions(path: Path) -> dict[str, str]:
    """The captions of such a file by picture; of several lines of one picture the last counts."""
    with path.open("rb") as file:
        return {record["image"]: record["caption"] for line in file if (record := _record(line))}


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

    Raises MmllmError where there are no pictures, no model, or another run writes the same file.
    """
    if not prompt.strip():
        raise MmllmError("the prompt is empty; say what the model is asked for each picture")
    read_manifest(model)  # a wrong path is told before anything is searched or written
    found = find_pictures(inputs)
    passed_over = describe_passed_over(found.passed_over)
    if not found.paths and not found.failed:
        searched = ", ".join(map(str, inputs)) + (f" ({passed_over})" if passed_over else "")
        raise MmllmError(f"no pictures in {searched}; searched for files that end in {' '.join(PICTURE_ENDINGS)}")
    stamp = {"model": model.resolve().name, "model_hash": file_hash(model / MANIFEST)[:16], "prompt": prompt}
    with Ledger(out) as ledger:
        # one that was cut off is written anew where it may become longer now
        todo = [path for path in found.paths if not _is_done(ledger.done.get(path), stamp, max_new_tokens)]
        _say_what_is_done(ledger, found.paths, todo, stamp)
        engine = Engine.load(model, device=device, dtype=dtype) if todo else None
        progress = _Progress(len(todo))
        failures = _Failures(out, progress)
        for path, reason in found.failed.items():
            failures.add(path, reason)
        if engine is not None:
            job = _Job(engine, ledger, failures, progress, stamp)
            with progress.bar:
                job.run(todo, batch_size, Sampling(max_new_tokens=max_new_tokens))
            ledger.drop_replaced()
            print(job.summary(out))
    if passed_over:
        print(passed_over)
    if failures.count:
        print(f"{failures.count} failed: {failures.path} lists them, and the next run tries them again")
    return failures.count


def _is_done(caption: DoneCaption | None, stamp: Mapping[str, str], max_new_tokens: int) -> bool:
    if caption is None:
        return False
    return caption.cut_at is None or caption.cut_at >= max_new_tokens or not caption.is_of(stamp)


def _say_what_is_done(ledger: Ledger, pictures: list[str], todo: list[str], stamp: dict[str, str]) -> None:
    done = [ledger.done[path] for path in pictures if path in ledger.done]
    if not done:
        return
    others = sum(not one.is_of(stamp) for one in done)
    by_others = f" ({others} of them by another model or prompt)" if others else ""
    again = sum(path in ledger.done for path in todo)
    cut = f", {again} of them cut off before and written anew now" if again else ""
    print(
        f"{len(done)} of {len(pictures)} pictures have a caption in {ledger.path} already{by_others}; "
        f"{len(todo)} left{cut}"
    )


class _Job:
    """Batches of pictures through the model, into the ledger."""

    def __init__(self, engine: Engine, ledger: Ledger, failures: _Failures, progress: _Progress, stamp: dict[str, str]):
        self.engine, self.ledger, self.failures, self.progress, self.stamp = engine, ledger, failures, progress, stamp
        self.finishes: dict[str, int] = {}
        self.max_new_tokens = 0

    def run(self, paths: Sequence[str], batch_size: int, sampling: Sampling) -> None:
        message = user_message(self.stamp["prompt"], 1)
        self.max_new_tokens = sampling.max_new_tokens
        for batch in _prepared(self.engine, paths, batch_size):
            good = [(path, picture) for path, picture in batch if isinstance(picture, PreparedImage)]
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
        except (MmllmError, RuntimeError) as error:
            if len(examples) == 1 and self.finishes:
                return [error]
            if len(examples) == 1:
                raise
            self.progress.say(f"a batch of {len(examples)} failed, so its pictures follow one by one: {error}")
        replies: list[Reply | Exception] = []
        for example in examples:
            try:
                replies += self.engine.reply_batch([example], sampling)
            except (MmllmError, RuntimeError) as error:
                replies.append(error)
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if len(failed) == len(examples) and not self.finishes:
            raise failed[0]
        return replies

    def _line(self, path: str, reply: Reply) -> dict[str, Any]:
        """What is kept of a reply. One without words, or cut off, is marked by its `finish`."""
        finish = reply.finish if reply.text else "empty"
        self.finishes[str(finish)] = self.finishes.get(str(finish), 0) + 1
        counts = {"finish": finish, "num_new_tokens": reply.num_new_tokens, "max_new_tokens": self.max_new_tokens}
        return {"image": path, "caption": reply.text, **self.stamp, **counts}

    def summary(self, out: Path) -> str:
        text = f"{sum(self.finishes.values())} pictures captioned in {out}"
        longer = (
            f"cut off at {self.max_new_tokens} tokens, and left out where this file is trained on; the same command "
            f"with --max-new-tokens {2 * self.max_new_tokens} writes them anew"
        )
        marks = {"length": longer, "empty": "without words, and left out of training too"}
        for finish, meaning in marks.items():
            if count := self.finishes.get(finish):
                text += f'\n{count} of them with "finish": "{finish}" ({meaning})'
        return text


def _prepare(engine: Engine, path: str) -> PreparedImage | ImageError:
    try:
        return engine.prepare(path)
    except ImageError as error:
        return error


def _prepared(
    engine: Engine, paths: Sequence[str], batch_size: int
) -> Iterator[list[tuple[str, PreparedImage | ImageError]]]:
    """Batches of (path, picture or why there is none); the next batch is read while the last one is used.

    What waits are pictures as the model takes them, however large their files are.
    """
    waiting: deque[list[tuple[str, Future[PreparedImage | ImageError]]]] = deque()
    pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read")
    try:
        for start in range(0, len(paths), batch_size):
            waiting.append([(path, pool.submit(_prepare, engine, path)) for path in paths[start : start + batch_size]])
            if len(waiting) > 1:
                yield [(path, future.result()) for path, future in waiting.popleft()]
        for batch in waiting:
            yield [(path, future.result()) for path, future in batch]
    finally:
        pool.shutdown(cancel_futures=True)
