"""This rank's micro-batches, in the order of the sampler, made ahead by worker processes where a run asks for them."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from mmllm.batching.sampler import Item
from mmllm.errors import MmllmError
from mmllm.training.stage import Stage


def _ignore_interrupt(worker: int) -> None:
    """A worker process gets the terminal's Ctrl-C too; only the run itself decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Items(Dataset[Any]):
    """The sampler yields the item itself: the index of an example, or a streamed example."""

    def __getitem__(self, item: Item) -> Item:
        return item


class StepBatches:
    """The micro-batches of each step of one rank.

    Where data are wrong or cannot be read, the MmllmError stands in place of the batch: an error that a worker raises
    would bring its traceback, and the other ranks must learn of it before they wait for this one.
    """

    def __init__(
        self, stage: Stage, batch_size: int, *, max_steps: int, accumulate_steps: int, rank: int, world_size: int
    ):
        self.stage, self.max_steps, self.accumulate_steps = stage, max_steps, accumulate_steps
        self.rank, self.world_size = rank, world_size
        self.sampler = stage.sampler(batch_size)
        self._states: dict[int, dict[int, Any]] = {}  # of the sampler after each step that batches are made for

    def _micro_batches(self, first_step: int) -> Iterator[Sequence[Item]]:
        for step in range(first_step, self.max_steps):
            items = self.sampler.rank_items(step, self.rank, self.world_size)
            self._states[step + 1] = self.sampler.state()
            yield from self.sampler.split_step(items, self.accumulate_steps)

    def _batch(self, items: Sequence[Item]) -> Any:
        try:
            return self.stage.batch(items)
        except MmllmError as error:
            return error
        except OSError as error:
            return MmllmError(f"the data can no longer be read: {error}")

    def start(self, first_step: int) -> Iterator[Any]:
        """The micro-batches from a step to the end of the run."""
        loader: DataLoader[Any] = DataLoader(
            _Items(),
            batch_sampler=self._micro_batches(first_step),  # type: ignore[arg-type]
            collate_fn=self._batch,
            num_workers=self.stage.num_workers,
            worker_init_fn=_ignore_interrupt,
        )
        return iter(loader)

    def state_after(self, step: int) -> dict[int, Any]:
        """The sampler's state after `step` steps; those before it are forgotten."""
        self._states = {done: state for done, state in self._states.items() if done >= step}
        return self._states[step]
