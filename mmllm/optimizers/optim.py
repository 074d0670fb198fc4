"""Optimizers and the learning-rate schedule. Each trained part, or each layer, has its own learning rate."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.checkpoint.adapter import quiet_bitsandbytes
from mmllm.config import BITSANDBYTES_KINDS, ConfigError, OptimConfig
from mmllm.optimizers.layers import hidden_matrices
from mmllm.optimizers.muon import build_muon

Parts = Mapping[str, Sequence[tuple[str, nn.Parameter]]]  # part -> its trained parameters with their names


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """No weight decay for biases, norms, and the `A_log` of state spaces, as in Mamba: https://arxiv.org/abs/2312.00752"""
    return parameter.ndim >= 2 and name.rpartition(".")[2] != "A_log"


def match(patterns: Sequence[str], names: Sequence[str], *, setting: str) -> dict[str, str]:
    """Name -> the pattern that matches it, for every name with a match. `*` and `?` work as in a shell.

    A pattern must match the whole name. Raises ConfigError for a pattern that matches no name, and for a name that two
    patterns match, since the order of patterns has no meaning.
    """
    pattern_by_name: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            shown = ", ".join([*names[:2], *names[-2:]])
            raise ConfigError(f"{setting}: {pattern!r} matches no trained parameter; examples of their names: {shown}")
        for name in matched:
            if name in pattern_by_name:
                other = pattern_by_name[name]
                raise ConfigError(f"{setting}: {other!r} and {pattern!r} both match {name}; make them exclusive")
            pattern_by_name[name] = pattern
    return pattern_by_name


def parameter_learning_rates(
    parts: Parts, config: OptimConfig, depths: Mapping[str, int], matrices: Collection[int]
) -> dict[str, float]:
    """The peak learning rate of every trained parameter, by name.

    A rate from `learning_rate_overrides` is used as it is. Other rates are that of the part, or `muon_learning_rate`
    for `matrices` (the ids of Muon's weights), times `layer_decay` for each layer between the parameter and the top of
    its part, as in BEiT (https://arxiv.org/abs/2106.08254). Raises ConfigError as `match` does.
    """
    names = [name for named in parts.values() for name, _ in named]
    overrides = match(list(config.learning_rate_overrides), names, setting="optim.learning_rate_overrides")
    rates = {}
    for part, named in parts.items():
        decay = config.layer_decay if isinstance(config.layer_decay, float) else config.layer_decay.get(part, 1.0)
        for name, parameter in named:
            rate = config.muon_learning_rate if id(parameter) in matrices else config.learning_rates[part]
            rates[name] = (
                config.learning_rate_overrides[overrides[name]]
                if name in overrides
                else rate * decay ** depths.get(name, 0)
            )
    return rates


def build_optimizers(
    module: nn.Module, parts: Parts, config: OptimConfig, *, depths: Mapping[str, int] | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW or an AdamW of bitsandbytes for all parts; or Muon for `module`'s hidden matrices and AdamW for the rest.

    Muon: https://kellerjordan.github.io/posts/muon/, 8 bits: https://arxiv.org/abs/2110.02861

    Every parameter group carries `peak`, the learning rate that the schedule scales. `depths` is the result of
    `mmllm.optimizers.layers.depths`. Raises ConfigError for patterns that match no parameter, or the same one.
    """
    chosen_matrices = hidden_matrices(module) if config.kind == "muon" else set()
    rates = parameter_learning_rates(parts, config, depths or {}, chosen_matrices)
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    matrices: dict[float, list[nn.Parameter]] = {}
    for part, named in parts.items():
        for is_decayed in (True, False):
            for name, parameter in named:
                if _is_decayed(name, parameter) != is_decayed:
                    continue
                if id(parameter) in chosen_matrices:
                    matrices.setdefault(rates[name], []).append(parameter)
                else:
                    groups.setdefault((part, is_decayed, rates[name]), []).append(parameter)
    adam_groups: list[dict[str, Any]] = [
        {"params": chosen, "lr": rate, "peak": rate, "weight_decay": config.weight_decay * is_decayed, "part": part}
        for (part, is_decayed, rate), chosen in groups.items()
    ]
    optimizers = [_adamw(config.kind)(adam_groups, betas=(0.9, config.beta2))]
    if matrices:
        muon_groups = [
            {"params": weights, "lr": rate, "peak": rate, "part": "matrices"} for rate, weights in matrices.items()
        ]
        optimizers.append(build_muon(muon_groups, weight_decay=config.weight_decay))
    return optimizers


def _adamw(kind: str) -> Any:
    """The AdamW constructor of this kind. bitsandbytes keeps the state of weights under 4096 elements in fp32."""
    if kind not in BITSANDBYTES_KINDS:
        return functools.partial(torch.optim.AdamW, fused=True)  # one pass over the weights
    quiet_bitsandbytes()
    from bitsandbytes import optim  # mmllm/runs/requirements.py has checked that it is installed

    return {"adamw8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw8bit": optim.PagedAdamW8bit}[
        kind
    ]


def lr_multiplier(step: int, config: OptimConfig) -> float:
    """The multiplier of peak learning rates at a step (from 0).

    Linear warm-up from zero, a plateau, then a cosine to zero over the last `decay_fraction` of the run.
    """
    warmup_steps = max(1, round(config.warmup_fraction * config.max_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = min(config.max_steps - warmup_steps, round(config.decay_fraction * config.max_steps))
    progress = (step - (config.max_steps - decay_steps)) / max(1, decay_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def set_learning_rates(optimizers: Sequence[torch.optim.Optimizer], multiplier: float) -> None:
    """Sets the learning rate of every parameter group to its peak times `multiplier`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * multiplier


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The 2-norm over all gradients that are not None: []. Zero if all are None."""
    norms = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    device = next((parameter.device for parameter in parameters), None)
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)
