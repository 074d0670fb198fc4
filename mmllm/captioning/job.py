"""The work of `mmllm caption`: batches of pictures go through the model into the ledger."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmllm.batch import Example, PreparedImage
from mmllm.captioning.ledger import Ledger
from mmllm.captioning.progress import FailureList, JobProgress
from mmllm.chat.conversation import user_message
from mmllm.errors import MmllmError
from mmllm.images import ImageError
from mmllm.inference.engine import Engine, Reply
from mmllm.inference.sampling import Sampling

NUM_READERS = 4  # threads that decode the next batch


class CaptionJob:
    """Captions pictures in batches and appends each batch to the ledger."""

    def __init__(
        self, engine: Engine, ledger: Ledger, failures: FailureList, progress: JobProgress, stamp: dict[str, str]
    ):
        self.engine, self.ledger, self.failures, self.progress, self.stamp = engine, ledger, failures, progress, stamp
        self.num_by_finish: dict[str, int] = {}  # captions so far, by the `finish` of their line
        self.max_new_tokens = 0

    def run(self, paths: Sequence[str], batch_size: int, sampling: Sampling) -> None:
        message = user_message(self.stamp["prompt"], 1)
        self.max_new_tokens = sampling.max_new_tokens
        for batch in _prepared(self.engine, paths, batch_size):
            decoded = [(path, picture) for path, picture in batch if isinstance(picture, PreparedImage)]
            examples = [Example(path, "caption", (message,), (picture,)) for path, picture in decoded]
            replies = self._replies(examples, sampling)
            records = [
                self._line(example.id, reply)
                for example, reply in zip(examples, replies, strict=True)
                if isinstance(reply, Reply)
            ]
            self.ledger.append(records)
            for path, result in [*batch, *((e.id, r) for e, r in zip(examples, replies, strict=True))]:
                if isinstance(result, Exception):
                    self.failures.add(path, str(result))
            self.progress.advance(len(batch))

    def _replies(self, examples: Sequence[Example], sampling: Sampling) -> list[Reply | Exception]:
        """The reply or the error of each example. Where a batch fails, its pictures are tried one by one.

        Raises the error where no picture of the job was captioned yet: then the cause is not a single picture.
        """
        try:
            return [*self.engine.reply_batch(examples, sampling)]
        except (MmllmError, RuntimeError) as error:
            if len(examples) == 1 and self.num_by_finish:
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
        if len(failed) == len(examples) and not self.num_by_finish:
            raise failed[0]
        return replies

    def _line(self, path: str, reply: Reply) -> dict[str, Any]:
        """The ledger's record of a reply. Its `finish` marks a caption that is empty or was cut off."""
        finish = str(reply.finish_reason) if reply.text else "empty"
        self.num_by_finish[finish] = self.num_by_finish.get(finish, 0) + 1
        counts = {"finish": finish, "num_new_tokens": reply.num_new_tokens, "max_new_tokens": self.max_new_tokens}
        return {"image": path, "caption": reply.text, **self.stamp, **counts}

    def summary(self, out: Path) -> str:
        text = f"{sum(self.num_by_finish.values())} pictures captioned in {out}"
        longer = (
            f"cut off at {self.max_new_tokens} tokens, and left out where this file is trained on; the same command "
            f"with --max-new-tokens {2 * self.max_new_tokens} writes them again"
        )
        marks = {"length": longer, "empty": "without words, and left out of training too"}
        for finish, meaning in marks.items():
            if count := self.num_by_finish.get(finish):
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
    """Batches of (path, prepared picture or error). The next batch is decoded while the caller uses this one.

    Pictures wait in the form that the model takes, so their memory does not depend on the size of their files.
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
