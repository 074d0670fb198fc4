"""The work of `mmllm caption`: pictures are taken from the ledger, read, captioned, checked and written back."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmllm.batch import Example, PreparedImage
from mmllm.captioning.inputs import read_picture
from mmllm.captioning.ledger import JobSettings, Ledger, Outcome, TakenPicture
from mmllm.captioning.lookalikes import perceptual_hash
from mmllm.captioning.progress import JobProgress
from mmllm.captioning.prompts import PromptTemplate
from mmllm.captioning.quality import RETRIED, flags_of
from mmllm.chat.conversation import user_message
from mmllm.errors import MmllmError, is_out_of_memory
from mmllm.images import image_size, load_image
from mmllm.inference.engine import Engine, Reply
from mmllm.inference.sampling import Sampling

NUM_READERS = 4  # threads that decode the next batch
SECONDS_BETWEEN_LOOKS = 0.5  # at pictures that other jobs have taken
# A caption that was flagged is tried again with these, and further captions of a picture are made with them.
RETRY: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "seed": 1}
VARIATION: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}


@dataclass(frozen=True)
class ReadPicture:
    """A picture as the model takes it, or why it is not captioned."""

    taken: TakenPicture
    content: str | None = None
    look: str | None = None
    prompt: str = ""
    prepared: PreparedImage | None = None
    reason: str | None = None

    def outcome(self, **values: Any) -> Outcome:
        return Outcome(self.taken, self.content, self.look, **values)


@dataclass(frozen=True)
class Draft:
    """A caption that has been checked."""

    reply: Reply
    flags: list[str]

    @property
    def finish(self) -> str:
        return str(self.reply.finish_reason) if self.reply.text else "empty"


class CaptionJob:
    """Captions the pictures that wait in a ledger for a job of these settings."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        progress: JobProgress,
        settings: JobSettings,
        *,
        batch_size: int,
        max_new_tokens: int,
        after_batch: Callable[[], None] = lambda: None,
    ):
        self.engine, self.ledger, self.progress, self.settings = engine, ledger, progress, settings
        self.batch_size, self.max_new_tokens, self.after_batch = batch_size, max_new_tokens, after_batch
        self.template = PromptTemplate(settings.prompt)
        self.num_by_flag: Counter[str] = Counter()
        self.num_captioned = self.num_retried = self.num_moved = self.num_unchanged = 0

    def run(self) -> None:
        """Works until none of the pictures waits, and no other job has one that this job may have to take over."""
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read") as pool:
            try:
                for batch in self._batches(pool):
                    self._work_on(batch)
                    self.after_batch()
            finally:
                pool.shutdown(cancel_futures=True)

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[list[ReadPicture]]:
        """Pictures in batches. The next batch is read while the caller uses this one.

        Pictures wait in the form that the model takes, so their memory does not depend on the size of their files.
        """
        reading: deque[list[Future[ReadPicture]]] = deque()
        while True:
            if taken := self.ledger.take(self.settings, self.batch_size):
                reading.append([pool.submit(self._read, picture) for picture in taken])
            if reading and (len(reading) > 1 or not taken):
                yield [future.result() for future in reading.popleft()]
            elif not taken and not self._waits_for_others():
                return

    def _waits_for_others(self) -> bool:
        if not (count := self.ledger.num_taken_by_others()):
            return False
        self.progress.say_once(f"another job has {count} of the pictures in hand; this one waits for it")
        time.sleep(SECONDS_BETWEEN_LOOKS)
        return True

    def _read(self, taken: TakenPicture) -> ReadPicture:
        content = None
        try:
            data = read_picture(taken.place, taken.origin)
            content = hashlib.sha256(data).hexdigest()
            if taken.waits_for == "changed" and content == taken.content:
                return ReadPicture(taken, content)
            prompt = self.template.fill(taken.place, taken.origin, taken.fields)
            picture = load_image(data, may_shrink=True, name=taken.place)
            prepared = self.engine.processor.prepare(picture, image_size(data))
            return ReadPicture(taken, content, perceptual_hash(picture), prompt, prepared)
        except MmllmError as error:
            return ReadPicture(taken, content, reason=str(error))
        except OSError as error:
            return ReadPicture(taken, content, reason=f"{taken.place} cannot be read ({error.strerror or error})")

    # A batch

    def _work_on(self, batch: Sequence[ReadPicture]) -> None:
        outcomes = []
        to_caption = []
        earlier = self.ledger.captions_of([str(read.content) for read in batch if read.prepared is not None])
        for read in batch:
            if read.reason is not None:
                outcomes.append(read.outcome(reason=read.reason))
            elif read.prepared is None:
                outcomes.append(read.outcome(is_unchanged=True))
                self.num_unchanged += 1
            elif any(
                self.ledger.move_caption(row, read.taken, read.prompt, self.max_new_tokens)
                for row in earlier.get(str(read.content), [])
            ):
                self.num_moved += 1
            else:
                to_caption.append(read)
        drafts = self._drafts(to_caption, self._sampling())
        self._retry_flagged(to_caption, drafts)
        others = self._other_captions(to_caption, drafts)
        for number, (read, draft) in enumerate(zip(to_caption, drafts, strict=True)):
            if isinstance(draft, Draft):
                outcomes.append(read.outcome(record=self._record(read, draft, others.get(number, []))))
                self.num_captioned += 1
                self.num_by_flag.update(draft.flags)
            else:
                outcomes.append(read.outcome(reason=f"{read.taken.place}: {draft}"))
        self.ledger.finish(outcomes, self.settings)
        for outcome in outcomes:
            if outcome.reason is not None:
                self.progress.say(f"failed: {outcome.reason}")
        num_flagged = sum(isinstance(draft, Draft) and bool(draft.flags) for draft in drafts)
        self.progress.advance(len(batch), num_flagged=num_flagged)

    def _sampling(self, **values: Any) -> Sampling:
        """What the job's captions must be like, and how they are sampled; greedy without `values`."""
        wanted = self.settings
        return Sampling(
            max_new_tokens=self.max_new_tokens, prefix=wanted.prefix, banned=wanted.banned, regex=wanted.regex,
            json_schema=wanted.json_schema, **values,
        )  # fmt: skip

    def _drafts(self, reads: Sequence[ReadPicture], sampling: Sampling) -> list[Draft | Exception]:
        examples = [
            Example(read.taken.place, "caption", (user_message(read.prompt, 1),), (read.prepared,))
            for read in reads
            if read.prepared is not None
        ]
        return [
            reply if isinstance(reply, Exception) else Draft(reply, self._flags(reply, read.prompt))
            for read, reply in zip(reads, self._replies(examples, sampling), strict=True)
        ]

    def _flags(self, reply: Reply, prompt: str) -> list[str]:
        is_cut = reply.finish_reason == "length" and bool(reply.text)
        return flags_of(reply.text, prompt, is_cut=is_cut, script=self.settings.script)

    def _retry_flagged(self, reads: Sequence[ReadPicture], drafts: list[Draft | Exception]) -> None:
        """Replaces flagged drafts by others that were sampled, where nothing is wrong with those."""
        if not self.settings.retry:
            return
        numbers = [n for n, one in enumerate(drafts) if isinstance(one, Draft) and set(one.flags) & set(RETRIED)]
        sampling = self._sampling(**RETRY)
        for number, draft in zip(numbers, self._drafts([reads[n] for n in numbers], sampling), strict=True):
            if isinstance(draft, Draft) and not draft.flags:
                drafts[number] = draft
                self.num_retried += 1

    def _other_captions(
        self, reads: Sequence[ReadPicture], drafts: Sequence[Draft | Exception]
    ) -> dict[int, list[str]]:
        """Further captions of each picture that has a first one, without those that are flagged or said twice."""
        texts = {n: [one.reply.text] for n, one in enumerate(drafts) if isinstance(one, Draft)}
        for seed in range(1, self.settings.num_captions):
            sampling = self._sampling(seed=seed, **VARIATION)
            for number, draft in zip(texts, self._drafts([reads[n] for n in texts], sampling), strict=True):
                if isinstance(draft, Draft) and not draft.flags and draft.reply.text not in texts[number]:
                    texts[number].append(draft.reply.text)
        return {number: captions[1:] for number, captions in texts.items()}

    def _record(self, read: ReadPicture, draft: Draft, others: Sequence[str]) -> dict[str, Any]:
        """The line of a picture. Its `finish` marks a caption that is empty or cut off, `flags` all that is wrong."""
        return {
            "image": read.taken.place,
            "caption": draft.reply.text,
            **({"other_captions": others} if self.settings.num_captions > 1 else {}),
            "model": self.settings.model,
            "model_hash": self.settings.model_hash,
            "prompt": read.prompt,
            "finish": draft.finish,
            "num_new_tokens": draft.reply.num_new_tokens,
            "max_new_tokens": self.max_new_tokens,
            **({"flags": draft.flags} if draft.flags else {}),
        }

    # The model

    def _replies(self, examples: Sequence[Example], sampling: Sampling) -> list[Reply | Exception]:
        """The reply or the error of each example.

        A batch that needs too much memory is halved, and so are all that follow. Of a batch that fails otherwise the
        pictures are tried one by one. Raises the error where no picture of the job was captioned yet and all fail: then
        the cause is not a single picture.
        """
        replies: list[Reply | Exception] = []
        waiting = deque([examples] if examples else [])
        while waiting:
            part = waiting.popleft()
            if len(part) > self.batch_size:  # memory was short in the meantime
                waiting.appendleft(part[self.batch_size :])
                part = part[: self.batch_size]
            try:
                replies += self.engine.reply_batch(part, sampling)
            except (MmllmError, RuntimeError, MemoryError) as error:
                if len(part) == 1:
                    replies.append(error)
                    continue
                size = self._smaller_batch(len(part), error)
                waiting.extendleft(reversed([part[at : at + size] for at in range(0, len(part), size)]))
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        if errors and len(errors) == len(replies) and not self.num_captioned:
            raise errors[0]
        return replies

    def _smaller_batch(self, size: int, error: BaseException) -> int:
        """The size of the batches in which a batch of this size, which failed, is tried again."""
        if not is_out_of_memory(error):
            self.progress.say(f"a batch of {size} failed, so its pictures follow one by one: {error}")
            return 1
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.batch_size = min(self.batch_size, max(1, size // 2))
        self.progress.say(f"out of memory with {size} pictures at once; from now on {self.batch_size}")
        return self.batch_size
