"""Muon for a machine that does not multiply in bf16: torch's own always computes in it, and takes many times as long.

https://kellerjordan.github.io/posts/muon/. Settings, state and update are those of torch.optim.Muon, so that a state of
either goes on with the other; only the precision is another one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.kernels.precision import multiplies_bf16


class Float32Muon(torch.optim.Muon):  # type: ignore[misc]
    """torch.optim.Muon in fp32, with all matrices of one shape in one product."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None, "no caller has one"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._with_momentum(parameter, group)
                    by_shape[update.shape].append((parameter, update))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalised(torch.stack([update for _, update in pairs]), group)
                rate = group["lr"] * math.sqrt(max(1, rows / columns))  # `adjust_lr_fn: original`, which is the default
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-rate)

    def _with_momentum(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The gradient with Nesterov's momentum, as torch.optim.Muon has it by default."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(average, group["momentum"])


def orthogonalised(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """Singular values near 1, by the quintic Newton-Schulz iteration: [N, A, B] -> [N, A, B]."""
    a, b, c = group["ns_coefficients"]
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if is_tall else matrices  # the smaller product of the two
    found = found / found.flatten(1).norm(dim=1).clamp(min=group["eps"])[:, None, None]
    for _ in range(group["ns_steps"]):
        gram = found @ found.mT  # [N, S, S], S the smaller of A and B
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, gram, found, beta=a)
    return found.mT if is_tall else found


def build_muon(groups: list[dict[str, Any]], *, weight_decay: float) -> torch.optim.Muon:
    """torch's own where the parameters' device multiplies in bf16."""
    device = groups[0]["params"][0].device
    kind = torch.optim.Muon if multiplies_bf16(device) else Float32Muon
    return kind(groups, weight_decay=weight_decay)
