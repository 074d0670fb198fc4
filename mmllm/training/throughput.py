"""How fast a run is, for every line of its log: tokens and samples a second, waste, waiting, and MFU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mmllm.training.distributed import all_reduce_sum
from mmllm.training.flops import StepFlops, device_peak, row_lengths


def recomputed(config: Any) -> tuple[bool, bool]:
    """Whether the layers of the LLM, and of the tower, are computed again in the backward."""
    setting = getattr(config.optim, "gradient_checkpointing", False)
    if isinstance(setting, bool):
        return setting, False
    return "language" in setting, "vision" in setting


def step_flops(stage: Any) -> StepFlops | None:
    """The counter of a stage's FLOPs; None for the warm-ups of the small models, whose losses are of other kinds.

    Build it before the model is wrapped for several devices.
    """
    if not hasattr(getattr(stage, "model", None), "vision_tower"):
        return None
    language, vision = recomputed(stage.config)
    plain = bool(getattr(stage.module, "plain_head", True))
    return StepFlops(stage.model, plain_head=plain, recomputes_language=language, recomputes_vision=vision)


class Throughput:
    """Counts over the steps since the last figures. Seconds that are no training (`paused`) do not count."""

    def __init__(self, flops: StepFlops | None, accelerator: Any, precision: str):
        self.flops, self.accelerator = flops, accelerator
        self.peak = device_peak(torch.device(accelerator.device), precision) if flops else None
        self._begin()

    def _begin(self) -> None:
        self._since, self._waited, self._paused = time.monotonic(), 0.0, 0.0
        self.samples = self.tokens = self.positions = 0
        self.model_flops = self.hardware_flops = 0.0

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
            mask = getattr(batch, "attention_mask", None)
            if mask is None:  # a batch of pairs, not of text
                continue
            self.samples += len(row_lengths(batch))
            self.tokens += int(mask.sum())
            self.positions += mask.numel()
            if self.flops:
                found = self.flops.count(batch)
                self.model_flops += found.model
                self.hardware_flops += found.hardware

    def figures(self) -> dict[str, float]:
        """The rates of all ranks together since the last call. Every rank has to call it."""
        seconds = max(1e-9, time.monotonic() - self._since - self._paused)
        mine = (self.samples, self.tokens, self.positions, self.model_flops, self.hardware_flops, self._waited)
        samples, tokens, positions, model, hardware, waited = (all_reduce_sum(self.accelerator, one) for one in mine)
        world = self.accelerator.num_processes
        self._begin()
        found = {"data_wait": waited / world / seconds}
        if positions:
            found = {
                "tokens_per_second": tokens / seconds, "samples_per_second": samples / seconds,
                "padding": 1 - tokens / positions, **found,
            }  # fmt: skip
        if self.peak:
            most = seconds * world * self.peak.flops_per_second
            found |= {"mfu": model / most, "hfu": hardware / most}
        return found

    def describe(self) -> str | None:
        """What the utilisation is measured against, for the head of a run's log."""
        if not self.peak or not self.flops:
            return None
        note = f"; {self.flops.note}" if self.flops.note else ""
        return f"MFU against {self.peak.flops_per_second / 1e12:.3g} TFLOP/s ({self.peak.source}){note}"
