"""How fast a run is, for every line of its log: tokens and samples a second, waste, waiting, and MFU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mmllm.distributed.ranks import all_reduce_sums
from mmllm.runs.flops import Flops, Peak, StepFlops, device_peak, row_lengths, threads_text


def _speed_text(flops_per_second: float) -> str:
    return (
        f"{flops_per_second / 1e12:.3g} TFLOP/s"
        if flops_per_second >= 1e12
        else f"{flops_per_second / 1e9:.3g} GFLOP/s"
    )


class Throughput:
    """Counts over the steps since the last figures. Seconds that are no training (`paused`) do not count.

    `num_tokens` counts those of a batch. Products in bf16 are measured against the peak of bf16, others against that of
    fp32. A peak that the run beats was measured while the machine was busy: it is raised to what the run reached.
    """

    def __init__(self, flops: StepFlops | None, accelerator: Any, num_tokens: Callable[[Any], int]):
        self.flops, self.accelerator, self.num_tokens = flops, accelerator, num_tokens
        kinds = {"bf16" if in_bf16 else "fp32" for in_bf16 in flops.in_bf16} if flops else set()
        device = torch.device(accelerator.device)
        self.peaks = {kind: device_peak(device, kind) for kind in sorted(kinds)}
        self._beaten = False
        self.restart()

    def restart(self) -> None:
        """Counts from here on."""
        self._since, self._waited, self._paused = time.monotonic(), 0.0, 0.0
        self.samples = self.tokens = self.text_tokens = self.positions = 0
        self.counted = Flops()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around taking the next batches: the device has nothing to do meanwhile."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around validation, and whatever else is no training."""
        begun = time.monotonic()
        yield
        self._paused += time.monotonic() - begun

    def stepped(self, batches: Sequence[Any]) -> None:
        """The micro-batches of a step that has been made."""
        for batch in batches:
            self.tokens += self.num_tokens(batch)
            mask = getattr(batch, "attention_mask", None)
            if mask is None:  # a batch of pairs, not of text
                continue
            self.samples += len(row_lengths(batch))
            self.text_tokens += int(mask.sum())
            self.positions += mask.numel()
            if self.flops:
                self.counted += self.flops.count(batch)

    def figures(self) -> dict[str, float]:
        """The rates of all ranks together since the last call. Every rank has to call it."""
        seconds = max(1e-9, time.monotonic() - self._since - self._paused)
        counted = self.counted
        mine = (
            self.samples, self.tokens, self.text_tokens, self.positions, self._waited, counted.model, counted.hardware,
            counted.model_bf16, counted.hardware_bf16,
        )  # fmt: skip
        samples, tokens, text_tokens, positions, waited, *operations = all_reduce_sums(self.accelerator, mine)
        world = self.accelerator.num_processes
        self.restart()
        found = {"tokens_per_second": tokens / seconds}
        if positions:
            found |= {"samples_per_second": samples / seconds, "padding": 1 - text_tokens / positions}
        found["data_wait"] = waited / world / seconds
        return found | self._utilisation(Flops(*operations), seconds * world)

    def _utilisation(self, counted: Flops, seconds: float) -> dict[str, float]:
        """The seconds that the device needs at its peak, as a share of those that it took."""
        if not self.peaks:
            return {}
        hfu = self._least_seconds(counted.hardware, counted.hardware_bf16) / seconds
        if hfu > 1:
            self._beaten = True
            self.peaks = {
                kind: Peak(peak.flops_per_second * hfu, "reached by this run") for kind, peak in self.peaks.items()
            }
        mfu = self._least_seconds(counted.model, counted.model_bf16) / seconds
        return {"mfu": min(1.0, mfu), "hfu": min(1.0, hfu)}

    def _least_seconds(self, operations: float, in_bf16: float) -> float:
        shares = {"bf16": in_bf16, "fp32": operations - in_bf16}
        return sum(shares[kind] / peak.flops_per_second for kind, peak in self.peaks.items())

    def beaten_text(self) -> str | None:
        """What to say, once, where the run has been faster than the peak that it was measured against."""
        if not self._beaten:
            return None
        self._beaten = False
        return f"this run is faster than the peak that was taken for this device: {self.describe()} from now on"

    def threads_text(self) -> str | None:
        """What to say where fewer threads would be faster."""
        if not self.peaks:
            return None
        dtype = torch.bfloat16 if "bf16" in self.peaks else torch.float32
        return threads_text(torch.device(self.accelerator.device), dtype)

    def describe(self) -> str | None:
        """What the utilisation is measured against, for the head of a run's log."""
        if not self.peaks or not self.flops:
            return None
        note = f"; {self.flops.note}" if self.flops.note else ""
        peaks = [f"{_speed_text(one.flops_per_second)} in {kind} ({one.source})" for kind, one in self.peaks.items()]
        return f"MFU against {' and '.join(peaks)}{note}"
