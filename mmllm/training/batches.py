"""This rank's micro-batches in sampler order, prepared ahead of time by worker processes if the stage has any."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from mmllm.batching.sampler import Item
from mmllm.errors import MmllmError
from mmllm.training.stage import Stage


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the workers too, but only the main process acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Items(Dataset[Any]):
    """Maps each item to itself: the sampler already yields an example's index, or a streamed example."""

    def __getitem__(self, item: Item) -> Item:
        return item


class StepBatches:
    """The micro-batches of each step of one rank.

    If data are wrong or cannot be read, an MmllmError is yielded instead of the batch. An error raised in a worker
    would arrive with its traceback, and the other ranks must learn of it before they wait for this one.
    """

    def __init__(
        self, stage: Stage, batch_size: int, *, max_steps: int, accumulate_steps: int, rank: int, world_size: int
    ):
        self.stage, self.max_steps, self.accumulate_steps = stage, max_steps, accumulate_steps
        self.rank, self.world_size = rank, world_size
        self.sampler = stage.sampler(batch_size)
        self._sampler_states: dict[int, dict[int, Any]] = {}  # step -> the sampler's state after it

    def _micro_batches(self, first_step: int) -> Iterator[Sequence[Item]]:
        for step in range(first_step, self.max_steps):
            items = self.sampler.rank_items(step, self.rank, self.world_size)
            self._sampler_states[step + 1] = self.sampler.state()
            yield from self.sampler.split_step(items, self.accumulate_steps)

    def _batch(self, items: Sequence[Item]) -> Any:
        try:
            return self.stage.batch(items)
        except MmllmError as error:
            return error
        except OSError as error:
            return MmllmError(f"the data can no longer be read: {error}")

    def start(self, first_step: int) -> Iterator[Any]:
        """The micro-batches from step `first_step` (from 0) to the end of the run, or an MmllmError for bad data."""
        loader: DataLoader[Any] = DataLoader(
            _Items(),
            batch_sampler=self._micro_batches(first_step),  # type: ignore[arg-type]
            collate_fn=self._batch,
            num_workers=self.stage.num_workers,
            worker_init_fn=_ignore_interrupt,
        )
        return iter(loader)

    def state_after(self, step: int) -> dict[int, Any]:
        """The sampler's state after `step` steps; earlier states are dropped."""
        self._sampler_states = {done: state for done, state in self._sampler_states.items() if done >= step}
        return self._sampler_states[step]
