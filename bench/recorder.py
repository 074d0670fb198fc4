"""Measures a contender's training: seconds, memory, losses and tokens, in blocks of steps."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.workload import Size
from mmllm.batch import IGNORE_INDEX

MIB = 2**20


class Recorder:
    """Measures a contender, which reports its batches as they are made and its steps as they end."""

    def __init__(self, size: Size, block: int):
        self.size, self.block = size, block
        self.losses: list[float] = []
        self.blocks: list[dict[str, float]] = []
        self.supervised: list[int] = []  # of each batch
        self.samples = self.slots = self.tokens = self.steps = 0
        self.waited = 0.0
        self.is_counting = False

    def loaded(self) -> None:
        """Weights and data are loaded: memory taken from now on counts as training's."""
        self.before_mib = self._memory()

    def ready(self) -> None:
        """The first step comes next: waits for its turn."""
        self.is_counting = True
        self._turn({"ready": True})

    def _memory(self) -> float:
        """MiB in use now, on the GPU or resident in main memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MIB
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB

    def _peak(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / MIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def _turn(self, message: dict[str, Any]) -> None:
        """Prints a message, then waits until this contender may go on."""
        print(f"@{json.dumps(message)}", flush=True)
        sys.stdin.readline()
        self._clock = time.perf_counter(), time.process_time(), self.waited

    def batch(self, attention_mask: Tensor, labels: Tensor, num_samples: int) -> None:
        """A batch was made."""
        if not self.is_counting:
            return
        self.samples += num_samples
        self.slots += attention_mask.numel()
        self.tokens += int(attention_mask.sum())
        self.supervised.append(int((labels[:, 1:] != IGNORE_INDEX).sum()))

    def step(self, loss: float | None = None) -> None:
        """A step has ended; `loss` is per supervised token."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.losses += [] if loss is None else [loss]
        self.steps += 1
        if self.steps % self.block:
            return
        began, began_cpu, waited = self._clock
        cpu = 0.0 if torch.cuda.is_available() else time.process_time() - began_cpu
        block = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu, "waited": self.waited - waited}
        self.blocks.append(block)
        if self.steps == self.size.steps:
            self.is_counting = False
            self.peak_mib = self._peak() - self.before_mib
        self._turn({"block": block})

    def end(self, before: float, after: float) -> None:
        """Prints the whole run: `before` and `after` are the probed loss before and after training."""
        fields = ("losses", "blocks", "samples", "slots", "tokens", "supervised", "peak_mib", "before_mib")
        print("@" + json.dumps({**{name: getattr(self, name) for name in fields}, "before": before, "after": after}))


def time_data(recorder: Recorder) -> None:
    """Adds up the seconds that training waits for any of torch's data loaders."""
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    original = _BaseDataLoaderIter.__next__

    def next_timed(self: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(self)
        finally:
            recorder.waited += time.perf_counter() - begun

    _BaseDataLoaderIter.__next__ = next_timed  # type: ignore[method-assign]
