"""One request to the engine: what it takes to answer it, and its answer as it grows.

The scheduler's thread writes the answer; any thread may read it, wait for it, or cancel it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mmllm.errors import MmllmError
from mmllm.inference.picture_features import Picture
from mmllm.inference.sampling import TokenSampler

FinishReason = Literal["end", "length", "stopped", "timeout"]


@dataclass(eq=False)
class Request:
    """A prompt, its settings, and its answer so far.

    Attributes:
        prompt_ids: with one image token for each slot of a picture.
        num_forced: the last tokens of the prompt that begin the answer.
        decode: the text of tokens of the answer; needed for stop texts.
        stop: the caller's event that ends the answer.
        deadline: of `time.monotonic`, after which the answer ends.
        priority: a waiting request of a higher one goes first.
    """

    prompt_ids: list[int]
    pictures: tuple[Picture, ...]
    sampler: TokenSampler
    max_new_tokens: int
    end_token_ids: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    num_forced: int = 0
    stop: threading.Event | None = None
    deadline: float | None = None
    priority: int = 0

    new_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    num_cached_tokens: int = 0  # of the prompt, whose keys and values came from the prefix cache
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None  # when it was written
    owner: threading.Thread = field(default_factory=threading.current_thread)
    _is_cancelled: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def max_length_tokens(self) -> int:
        """Of prompt and answer: the columns of the KV cache that it may need."""
        return len(self.prompt_ids) + self.max_new_tokens

    @property
    def question_ids(self) -> list[int]:
        """The prompt without the tokens that begin the answer."""
        return self.prompt_ids[: len(self.prompt_ids) - self.num_forced]

    @property
    def answer_ids(self) -> list[int]:
        """With the tokens that it was made to begin with."""
        return self.prompt_ids[len(self.prompt_ids) - self.num_forced :] + self.new_ids

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def cancel(self) -> None:
        """The caller does not want the answer any more; the scheduler drops it before the next token."""
        self._is_cancelled = True

    def end_if_stopped(self) -> bool:
        """Ends the answer where the caller or its deadline says so. Returns whether it is finished."""
        if not self.is_finished:
            # an answer that the main thread began ends with it, or a program could not end before its answer
            has_left = self.owner is threading.main_thread() and not self.owner.is_alive()
            if self._is_cancelled or has_left or (self.stop is not None and self.stop.is_set()):
                self._end("stopped")
            elif self.deadline is not None and time.monotonic() >= self.deadline:
                self._end("timeout")
        return self.is_finished

    def append(self, token: int) -> None:
        """Adds a token, and ends the answer where it is the last one."""
        with self._changed:
            if self.first_token is None:
                self.first_token = time.monotonic()
            self.new_ids.append(token)
            self._changed.notify_all()
        sampling = self.sampler.sampling
        if token in self.end_token_ids or (sampling.stop and sampling.has_stop(self.decode(self.answer_ids))):
            self._end("end")
        elif len(self.new_ids) >= self.max_new_tokens:
            self._end("length")

    def _end(self, reason: FinishReason) -> None:
        with self._changed:
            self.finish_reason = reason
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Ends it without an answer."""
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def wait_for_end(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.is_finished)

    def wait_for_token(self, num_seen: int) -> None:
        """Waits until it has more than `num_seen` new tokens, or is finished."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_finished or len(self.new_ids) > num_seen)

    def raise_error(self) -> None:
        """Raises what made it fail, if it failed."""
        if self.error is not None:
            raise self.error


def choose_tokens(requests: Sequence[Request], logits: Tensor) -> None:
    """Appends the next token of each unfinished request, by its row of `logits` [B, V]."""
    if any(request.sampler.is_plain for request in requests):
        likeliest = logits.argmax(-1).tolist()
    for row, request in enumerate(requests):
        if request.is_finished:
            continue
        if request.sampler.is_plain:
            request.append(likeliest[row])
            continue
        try:
            token = request.sampler.choose(request.question_ids, request.answer_ids, logits[row])
        except MmllmError as error:
            request.fail(error)
            continue
        if request.sampler.sampling.logprobs:
            request.logprobs.append(float(logits[row].float().log_softmax(-1)[token]))
        request.append(token)
