"""Sampling of a reply's tokens: greedy, or random with a separate generator for each conversation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from mmllm.errors import MmllmError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a reply. `temperature` 0 is greedy; `seed` makes a sampled reply repeatable.

    Raises MmllmError for a value that is out of range.

    Example:
        import mmllm

        model = mmllm.load("runs/tiny/stage2")
        sampling = mmllm.Sampling(temperature=0.7, top_p=0.9, max_new_tokens=32, seed=1)
        print(model.ask("Describe the picture.", ["data/scenes/val/images/000003.png"], sampling).text)
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise MmllmError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise MmllmError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens < 1:
            raise MmllmError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


GREEDY = Sampling()


class TokenSampler:
    """A logits processor of transformers: samples each row's next token, and masks all others for greedy decoding.

    Each row has its own generator, so a reply depends on its seed and not on the other rows of the batch. The global
    generator of torch stays unchanged.
    """

    def __init__(self, sampling: Sampling):
        self.seed = sampling.seed
        self.warpers = [TemperatureLogitsWarper(float(sampling.temperature)), TopPLogitsWarper(sampling.top_p)]
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, T], [B, V] -> [B, V]
        if not self.generators:
            self.generators = [torch.Generator(scores.device) for _ in range(len(scores))]
            for generator in self.generators:
                generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        warped = scores.float()
        for warper in self.warpers:
            warped = warper(input_ids, warped)
        tokens = torch.stack(
            [
                torch.multinomial(probs, 1, generator=generator)
                for probs, generator in zip(warped.softmax(-1), self.generators, strict=True)
            ]
        )
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)
