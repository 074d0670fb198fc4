"""The engine's loop: which requests run, and one token for each of them a step.

The kinds of batching differ in who may enter, and when:

- `continuous`: whoever waits, at every step, as far as rows and KV cache suffice;
- `dynamic`: whoever waits, when the batch before has been answered;
- `static`: the requests of one call, when the call before has been answered.

With the first two, one thread runs the model, as long as there are requests. They wait in a bounded queue, by priority
and then in order of arrival. With `static`, the model runs in the thread of its caller, which may be one of several
training processes that hold its weights together.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from mmllm.errors import MmllmError
from mmllm.inference.decoders import Decoder
from mmllm.inference.kv_cache import SPARE_COLUMNS
from mmllm.inference.requests import Request

Batching = Literal["continuous", "dynamic", "static"]
# Prompt tokens of one step, padding included. The next requests follow at the next step, so that running ones go on.
MAX_PREFILL_TOKENS = 4096
MAX_PREFILL_TOKENS_BESIDE_RUNNING = 512
SECONDS_BETWEEN_CHECKS = 0.05  # of `stop` and deadlines, by a caller that waits for a place in the queue


class EngineBusyError(MmllmError):
    """The queue is full, and the caller does not wait."""


class WaitingRequests:
    """The bounded queue between callers and the loop. Safe from any thread."""

    def __init__(self, max_requests: int):
        self.max_requests = max_requests
        self.changed = threading.Condition()
        self._requests: list[Request] = []  # the next one first

    def __len__(self) -> int:
        return len(self._requests)

    def put(self, request: Request, *, wait: bool = True) -> None:
        """Queues a request, once there is a place. Raises EngineBusyError where there is none and `wait` is False."""
        with self.changed:
            while len(self._requests) >= self.max_requests:
                if not wait:
                    raise EngineBusyError(f"{self.max_requests} requests are waiting already; ask again later")
                self.changed.wait(SECONDS_BETWEEN_CHECKS)
                if request.end_if_stopped():
                    return
            bisect.insort(self._requests, request, key=lambda one: -one.priority)  # after equals: in order of arrival
            self.changed.notify_all()

    def drop_stopped(self) -> None:
        with self.changed:
            self._requests = [request for request in self._requests if not request.end_if_stopped()]
            self.changed.notify_all()

    def take(self, is_admitted: Callable[[Request], bool]) -> list[Request]:
        """Takes requests from the front as long as they are admitted: one that is too large is not overtaken."""
        with self.changed:
            count = next((n for n, one in enumerate(self._requests) if not is_admitted(one)), len(self._requests))
            taken, self._requests = self._requests[:count], self._requests[count:]
            self.changed.notify_all()
            return taken


class Scheduler:
    """Admits requests by rows and memory, and advances the running ones.

    Args:
        max_rows: requests that run at once.
        max_cells: tokens of all rows, padding included, for which the KV cache has memory; None: no limit.
        max_waiting: requests in the queue; a caller waits for a place.
    """

    def __init__(
        self,
        decoder: Decoder,
        batching: Literal["continuous", "dynamic"],
        *,
        max_rows: int,
        max_cells: int | None,
        max_waiting: int,
    ):
        self.decoder, self.batching = decoder, batching
        self.max_rows, self.max_cells = max_rows, max_cells
        self.waiting = WaitingRequests(max_waiting)
        self.step_seconds: list[float] | None = None  # set to a list to record how long each step takes
        self._thread: threading.Thread | None = None  # lives while there are requests
        self._starting = threading.Lock()

    def submit(self, request: Request, *, wait: bool = True) -> None:
        """Queues a request. Raises MmllmError for one that never fits, EngineBusyError as `WaitingRequests.put`."""
        if self.max_cells is not None and _num_columns([request]) > self.max_cells:
            raise MmllmError(
                f"the prompt of {len(request.prompt_ids)} tokens and an answer of up to {request.max_new_tokens} need "
                f"more than the {self.max_cells} tokens for which the KV cache has memory; ask for a shorter answer, "
                "or give the engine more cache_bytes"
            )
        self.waiting.put(request, wait=wait)
        with self._starting:
            if self._thread is None or not self._thread.is_alive():  # a forked process has no threads
                # no daemon: Python must not end while a thread is inside torch
                self._thread = threading.Thread(target=self._serve, name="engine")
                self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                self.run_until_idle()
            except Exception as error:  # noqa: BLE001 - nobody may wait forever for a loop that has ended
                self.fail_all(error)
            with self._starting:
                if not len(self.waiting):
                    self._thread = None
                    return

    def run(self, requests: Sequence[Request]) -> None:
        """Answers these requests. Raises the first error of one of them, when all have ended."""
        try:
            for request in requests:
                self.submit(request)
            for request in requests:
                request.wait_for_end()
        finally:
            for request in requests:
                request.cancel()
        for request in requests:
            request.raise_error()

    def run_until_idle(self) -> None:
        """Steps until no request runs or waits."""
        with torch.inference_mode():
            while self.decoder.requests or len(self.waiting):
                begun = time.perf_counter()
                self.step()
                if self.step_seconds is not None:
                    self.step_seconds.append(time.perf_counter() - begun)

    def fail_all(self, error: Exception) -> None:
        """Ends every request with this error."""
        for request in [*self.decoder.requests, *self.waiting.take(lambda request: True)]:
            request.fail(error)
        self.decoder.clear()

    def step(self) -> None:
        """Admits whoever may enter, and writes one token for each running request."""
        self.waiting.drop_stopped()
        for request in self.decoder.requests:
            request.end_if_stopped()
        self.decoder.drop_finished()
        if admitted := self._admit():
            self._prefill(admitted)
        if self.decoder.requests:
            try:
                self.decoder.decode()
            except Exception as error:  # noqa: BLE001 - each caller raises it again
                for request in self.decoder.requests:
                    if not request.is_finished:
                        request.fail(error)
                self.decoder.clear()

    def _admit(self) -> list[Request]:
        running = list(self.decoder.requests)
        if running and self.batching != "continuous":
            return []
        admitted: list[Request] = []

        def is_admitted(request: Request) -> bool:
            together = [*running, *admitted, request]
            num_cells = _num_columns(together) * len(together)
            fits = len(together) <= self.max_rows and (self.max_cells is None or num_cells <= self.max_cells)
            if self.batching == "continuous" and admitted:
                prefill = max(len(one.prompt_ids) for one in [*admitted, request]) * (len(admitted) + 1)
                fits = fits and prefill <= (MAX_PREFILL_TOKENS_BESIDE_RUNNING if running else MAX_PREFILL_TOKENS)
            if fits:
                admitted.append(request)
            return fits

        return self.waiting.take(is_admitted)

    def _prefill(self, requests: Sequence[Request]) -> None:
        """Where a group fails, its requests are tried one by one, so that one does not take the others with it."""
        try:
            self.decoder.prefill(requests)
        except Exception as error:  # noqa: BLE001 - its caller raises it again
            if len(requests) == 1:
                requests[0].fail(error)
                return
            for request in requests:
                if request.is_finished or request in self.decoder.requests:
                    continue
                if request.new_ids:
                    request.fail(error)
                else:
                    self._prefill([request])


def _num_columns(requests: Sequence[Request]) -> int:
    """The most columns that a KV cache of these requests allocates."""
    return max(request.max_length_tokens for request in requests) + SPARE_COLUMNS


class CallerScheduler:
    """`static` batching: a call's requests as one batch, in the thread of the caller."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self._lock = threading.Lock()

    def run(self, requests: Sequence[Request]) -> None:
        """Answers these requests, once the calls before have been answered. Raises what the model raises."""
        with self._lock, torch.inference_mode():
            waiting = [request for request in requests if not request.end_if_stopped()]
            if waiting:
                self.decoder.prefill(waiting)
        for request in requests:
            request.raise_error()

    def submit(self, request: Request, *, wait: bool = True) -> None:
        """Answers a request in a thread of its own."""

        def work() -> None:
            try:
                self.run([request])
            except Exception as error:  # noqa: BLE001 - its caller raises it again
                request.fail(error)

        threading.Thread(target=work, name="engine").start()
