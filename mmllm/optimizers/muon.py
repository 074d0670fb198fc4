"""Muon in fp32, for devices without bf16 instructions: torch.optim.Muon always uses bf16, many times slower there.

https://kellerjordan.github.io/posts/muon/. Settings, state and update are those of torch.optim.Muon, so a saved state
of either loads into the other. Only the precision differs.
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
    """torch.optim.Muon in fp32, with all matrices of one shape in one batched product."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._with_momentum(parameter, group)
                    by_shape[update.shape].append((parameter, update))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalised(torch.stack([update for _, update in pairs]), group)
                update_rate = group["lr"] * math.sqrt(max(1, rows / columns))  # the default, adjust_lr_fn "original"
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-update_rate)

    def _with_momentum(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The gradient with Nesterov momentum, the default of torch.optim.Muon."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average: Tensor = state["momentum_buffer"]
        average.lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(average, group["momentum"])


def orthogonalised(matrices: Tensor, group: dict[str, Any]) -> Tensor:
    """Brings singular values near 1 by the quintic Newton-Schulz iteration: [N, A, B] -> [N, A, B]."""
    a, b, c = group["ns_coefficients"]
    is_tall = matrices.shape[1] > matrices.shape[2]
    iterate = matrices.mT if is_tall else matrices  # so that the Gram matrix is the smaller one
    iterate = iterate / iterate.flatten(1).norm(dim=1).clamp(min=group["eps"])[:, None, None]
    for _ in range(group["ns_steps"]):
        gram = iterate @ iterate.mT  # [N, S, S], S the smaller of A and B
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        iterate = torch.baddbmm(iterate, gram, iterate, beta=a)
    return iterate.mT if is_tall else iterate


def build_muon(groups: list[dict[str, Any]], *, weight_decay: float) -> torch.optim.Muon:
    """torch.optim.Muon if the parameters' device has bf16 instructions, otherwise Float32Muon."""
    device = groups[0]["params"][0].device
    optimizer_class = torch.optim.Muon if multiplies_bf16(device) else Float32Muon
    return optimizer_class(groups, weight_decay=weight_decay)
