"""Adapters: LoRA and its variants."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmllm.config.base import Positive, PositiveInt, Section


class LoraConfig(Section):
    """LoRA on linear layers through peft. Paper: https://arxiv.org/abs/2106.09685"""

    rank: PositiveInt = 16
    """Rows of the two small matrices of each adapted layer."""
    alpha: Positive = 32
    """The adapter's output is scaled by `alpha / rank`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the adapter's inputs that are set to 0 in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Which layers are adapted: names, a pattern, or `all-linear`."""
    dora: bool = False
    """DoRA: direction and length of the weights are adapted apart. Paper: https://arxiv.org/abs/2402.09353"""
    rslora: bool = False
    """Scale by `alpha / sqrt(rank)` in place of `alpha / rank`. Paper: https://arxiv.org/abs/2312.03732"""


class LanguageLoraConfig(LoraConfig):
    """LoRA of the LLM, or QLoRA with `quantise`."""

    quantise: Literal["nf4", "int8"] | None = None
    """Hold the frozen base weights under the adapters in 4 bits (nf4) or 8 bits (int8). Default: not quantised."""
