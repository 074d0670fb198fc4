"""Convolution and pooling: neighbouring patches are mixed, pooled to a smaller square grid, and mixed again."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from projector.contract import Grid, Projector, check_count, grid_side, patch_grid


class ConvBlock(nn.Module):
    """RegNet's residual block with squeeze and excitation, which Honeybee uses; channels come last.

    Papers: RegNet, https://arxiv.org/abs/2003.13678; squeeze and excitation, https://arxiv.org/abs/1709.01507. Unlike
    RegNet's, no activation follows the sum (https://arxiv.org/abs/1603.05027): SiLU would damp the identity path again
    in every block.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix_in = nn.Linear(width, width, bias=False)
        self.norm_in = nn.LayerNorm(width)
        self.neighbours = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False)
        self.norm_neighbours = nn.LayerNorm(width)
        squeezed = max(1, round(width / 4))  # RegNet-Y's se_ratio of 0.25
        self.gate = nn.Sequential(nn.Linear(width, squeezed), nn.SiLU(), nn.Linear(squeezed, width), nn.Sigmoid())
        self.mix_out = nn.Linear(width, width, bias=False)
        self.norm_out = nn.LayerNorm(width)
        self.activation = nn.SiLU()

    def forward(self, grid: Tensor) -> Tensor:  # [B, H, W, Dv] -> [B, H, W, Dv]
        mixed = self.activation(self.norm_in(self.mix_in(grid)))
        mixed = self.neighbours(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        mixed = self.activation(self.norm_neighbours(mixed))
        mixed = mixed * self.gate(mixed.mean((1, 2), keepdim=True))
        out: Tensor = grid + self.norm_out(self.mix_out(mixed))
        return out


def pooling_weights(side: int, token_side: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[token_side, side]: the weight of each patch in each token along one side, with torch's adaptive windows."""
    tokens = torch.arange(token_side, device=device)[:, None]
    patches = torch.arange(side, device=device)
    first, end = tokens * side // token_side, -((tokens + 1) * -side // token_side)
    window = ((patches >= first) & (patches < end)).float()
    return (window / window.sum(1, keepdim=True)).to(dtype)


def average_pool(grid: Tensor, token_grid: Grid) -> Tensor:  # [B, H, W, Dv] -> [B, *token_grid, Dv]
    """Adaptive average pooling as two small products, since torch's own has no deterministic gradient on CUDA."""
    rows, columns = (
        pooling_weights(side, token_side, device=grid.device, dtype=grid.dtype)
        for side, token_side in zip(grid.shape[1:3], token_grid, strict=True)
    )
    return torch.einsum("ih,jw,bhwd->bijd", rows, columns, grid)


class CAbstractorProjector(Projector):
    """`depth` conv blocks, adaptive average pooling to `num_tokens` (a square), `depth` conv blocks, one linear layer.

    By default M is a quarter of P, as Honeybee's 144 of 576. Paper: Honeybee, https://arxiv.org/abs/2312.06742
    """

    def __init__(self, vision_dim: int, llm_dim: int, *, num_tokens: int | None = None, depth: int = 3) -> None:
        super().__init__()
        check_count("c_abstractor", "depth", depth)
        self.token_side: int | None = None
        if num_tokens is not None:
            check_count("c_abstractor", "num_tokens", num_tokens)
            self.token_side = math.isqrt(num_tokens)
            if self.token_side**2 != num_tokens:
                raise ValueError(
                    f"c_abstractor projector needs num_tokens to be a square number, got {num_tokens}; "
                    f"nearest: {self.token_side**2} and {(self.token_side + 1) ** 2}"
                )
        # The blocks add values of unit scale, but features of a tower's inner layer may be many times larger.
        self.norm = nn.LayerNorm(vision_dim)
        self.before = nn.Sequential(*(ConvBlock(vision_dim) for _ in range(depth)))
        self.after = nn.Sequential(*(ConvBlock(vision_dim) for _ in range(depth)))
        self.out = nn.Linear(vision_dim, llm_dim)

    @property
    def token_stride(self) -> int | None:
        return 2 if self.token_side is None else None

    def num_tokens(self, num_patches: int) -> int:
        side = grid_side("c_abstractor", num_patches)
        if self.token_side is None:
            return math.ceil(side / 2) ** 2
        if self.token_side > side:
            raise ValueError(
                f"c_abstractor projector cannot make {self.token_side**2} tokens from {num_patches} patches; "
                f"set num_tokens to {num_patches} or less"
            )
        return self.token_side**2

    def forward(self, patches: Tensor, grid: Grid | None = None) -> Tensor:  # [B, P, Dv] -> [B, M, D]
        rows, columns = patch_grid("c_abstractor", patches.shape[1], grid)
        if self.token_side is None:
            token_grid = (math.ceil(rows / 2), math.ceil(columns / 2))
        else:
            self.num_tokens(patches.shape[1])  # raises if the grid cannot be pooled to so many tokens
            token_grid = (self.token_side, self.token_side)
        mixed = self.before(self.norm(patches).unflatten(1, (rows, columns)))  # [B, H, W, Dv]
        pooled = self.after(average_pool(mixed, token_grid))  # [B, *token_grid, Dv]
        tokens: Tensor = self.out(pooled.flatten(1, 2))
        return tokens
