"""The optimizer and its learning rates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmllm.config.base import Fraction, NonNegative, Positive, PositiveInt, Section

BITSANDBYTES_KINDS = ("adamw8bit", "paged_adamw", "paged_adamw8bit")  # of optimizers

_Decay = Annotated[float, Field(gt=0, le=1)]


class OptimConfig(Section):
    """AdamW or Muon, with cosine decay after a linear warm-up."""

    kind: Literal["adamw", "muon", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """`muon` updates the weights of hidden linear layers, and AdamW all others. `adamw8bit` takes a quarter of AdamW's
    memory; `paged_...` moves its state to main memory when the GPU is full. 8 bits and paging need
    `mmllm[quant]`, paging a CUDA GPU."""
    learning_rates: dict[str, Positive]
    """The peak learning rate of each trained part: one for each name that `train` lists."""
    muon_learning_rate: Positive = 0.02
    """With `kind: muon`, the peak learning rate of the weights that Muon updates."""
    learning_rate_overrides: dict[str, Positive] = Field(default_factory=dict)
    """Patterns of parameter names, such as `language_model.lm_head.*`, with a peak learning rate of their own."""
    layer_decay: _Decay | dict[str, _Decay] = 1.0
    """Each layer's learning rate is this factor times that of the layer above it. One number, or one for each part.
    1 is the same rate for all layers."""
    max_steps: PositiveInt
    """Optimizer steps of the run."""
    warmup_fraction: Fraction = 0.03
    """The share of the steps in which learning rates rise linearly from 0."""
    decay_fraction: Fraction = 1.0
    """The share of the steps, at the end, in which learning rates fall along a cosine. 1 is all after the warm-up."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices, embeddings included. Biases and norms have none."""
    beta2: Fraction = 0.999
    """AdamW's decay of the running mean of squared gradients."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm, over all trained parameters, where it is larger."""
