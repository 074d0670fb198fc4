"""A run's speed for each line of its log: tokens and samples per second, padding, waiting for data, MFU and HFU."""

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
    """Counts over the steps since the last metrics. Time spent in `paused` does not count.

    `num_tokens` counts the tokens of a batch. bf16 products are measured against the bf16 peak, others against the fp32
    peak. If the run is faster than its peaks, they are raised to its speed: a busy machine may have measured too low.
    """

    def __init__(self, flops: StepFlops | None, accelerator: Any, num_tokens: Callable[[Any], int]):
        self.flops, self.accelerator, self.num_tokens = flops, accelerator, num_tokens
        kinds = {"bf16" if in_bf16 else "fp32" for in_bf16 in flops.in_bf16} if flops else set()
        device = torch.device(accelerator.device)
        self.peaks = {kind: device_peak(device, kind) for kind in sorted(kinds)}
        self._beaten = False
        self.restart()

    def restart(self) -> None:
        """Sets all counts to 0."""
        self._since, self._waited, self._paused = time.monotonic(), 0.0, 0.0
        self.samples = self.tokens = self.text_tokens = self.positions = 0
        self.counted = Flops()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps taking the next batches, while the device is idle."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Wraps validation and everything else that is not training."""
        begun = time.monotonic()
        yield
        self._paused += time.monotonic() - begun

    def stepped(self, batches: Sequence[Any]) -> None:
        """Counts the micro-batches of a finished step."""
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

    def metrics(self) -> dict[str, float]:
        """Metrics of all ranks together since the last call, by name. Every rank has to call it."""
        seconds = max(1e-9, time.monotonic() - self._since - self._paused)
        counted = self.counted
        local_values = (
            self.samples, self.tokens, self.text_tokens, self.positions, self._waited, counted.model, counted.hardware,
            counted.model_bf16, counted.hardware_bf16,
        )  # fmt: skip
        samples, tokens, text_tokens, positions, waited, *operations = all_reduce_sums(self.accelerator, local_values)
        world = self.accelerator.num_processes
        self.restart()
        metrics = {"tokens_per_second": tokens / seconds}
        if positions:
            metrics |= {"samples_per_second": samples / seconds, "padding": 1 - text_tokens / positions}
        metrics["data_wait"] = waited / world / seconds
        return metrics | self._utilization(Flops(*operations), seconds * world)

    def _utilization(self, counted: Flops, seconds: float) -> dict[str, float]:
        """MFU and HFU: the seconds that the device needs at its peak, as a share of the seconds taken."""
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
        """A note if the run was faster than its peak since the last call; otherwise None."""
        if not self._beaten:
            return None
        self._beaten = False
        return f"this run is faster than the peak assumed for this device; from now on: {self.describe()}"

    def threads_text(self) -> str | None:
        """The warning if fewer threads would be faster; otherwise None."""
        if not self.peaks:
            return None
        dtype = torch.bfloat16 if "bf16" in self.peaks else torch.float32
        return threads_text(torch.device(self.accelerator.device), dtype)

    def describe(self) -> str | None:
        """The peaks that MFU is measured against, for the start of a run; None if FLOPs are not counted."""
        if not self.peaks or not self.flops:
            return None
        note = f"; {self.flops.note}" if self.flops.note else ""
        peaks = [f"{_speed_text(peak.flops_per_second)} in {kind} ({peak.source})" for kind, peak in self.peaks.items()]
        return f"MFU against {' and '.join(peaks)}{note}"
