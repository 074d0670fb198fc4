"""Optimizers and the learning-rate schedule. Each trained part has a learning rate of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmllm.config import OptimConfig

Parts = Mapping[str, Sequence[tuple[str, nn.Parameter]]]  # part -> its trained parameters with their names


def _is_decayed(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2  # biases and norms are not


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon is made for: 2-D weights between hidden layers, so no embeddings, heads or convolutions."""
    outer = ("embed", "lm_head", "read_out", "visual.proj", "text_projection")
    return parameter.ndim == 2 and not any(word in name for word in outer)


def build_optimizers(parts: Parts, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW over all parts, or Muon on hidden matrices and AdamW on the rest.

    Muon: https://kellerjordan.github.io/posts/muon/

    Every parameter group carries `peak`, the learning rate that the schedule scales.
    """
    adam_groups: list[dict[str, object]] = []
    matrices: list[nn.Parameter] = []
    for part, named in parts.items():
        rate = config.learning_rates[part]
        rest = list(named)
        if config.kind == "muon":
            matrices += [p for name, p in rest if _is_hidden_matrix(name, p)]
            rest = [(name, p) for name, p in rest if not _is_hidden_matrix(name, p)]
        for decayed in (True, False):
            chosen = [p for _, p in rest if _is_decayed(p) == decayed]
            if chosen:
                decay = config.weight_decay if decayed else 0.0
                adam_groups.append({"params": chosen, "lr": rate, "peak": rate, "weight_decay": decay, "part": part})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam_groups, betas=(0.9, config.beta2))]
    if matrices:
        rate = config.matrix_learning_rate
        group = {"params": matrices, "lr": rate, "peak": rate, "part": "matrices"}
        optimizers.append(torch.optim.Muon([group], weight_decay=config.weight_decay))
    return optimizers


def rate_factor(step: int, config: OptimConfig) -> float:
    """Linear warm-up from zero, a plateau, then a cosine to zero over the last `decay_fraction` of the run."""
    warmup_steps = max(1, round(config.warmup_fraction * config.max_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = min(config.max_steps - warmup_steps, round(config.decay_fraction * config.max_steps))
    progress = (step - (config.max_steps - decay_steps)) / max(1, decay_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm over all gradients that are there; zero where none is."""
    norms = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
