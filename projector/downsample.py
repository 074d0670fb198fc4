"""Fewer tokens: each square of factor x factor neighbouring patches becomes one token, M == P / factor**2."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from projector.contract import Grid, Projector, check_count, grid_side, patch_grid

Mode = Literal["pixel_shuffle", "average"]


def pixel_shuffle(patches: Tensor, factor: int, grid: Grid | None = None) -> Tensor:
    # [B, P, Dv] -> [B, P / factor**2, factor**2 * Dv]
    """Concatenates the channels of factor x factor neighbours, row by row; the tokens are in row order too.

    The layout is that of Idefics3's connector, https://arxiv.org/abs/2408.12637
    """
    batch, num_patches, width = patches.shape
    rows, columns = (side // factor for side in patch_grid("downsample", num_patches, grid))
    neighbours = patches.reshape(batch, rows, factor, columns, factor, width)
    return neighbours.transpose(2, 3).reshape(batch, rows * columns, factor**2 * width)


class DownsampleProjector(Projector):
    """Joins neighbouring patches; LayerNorm and a two-layer MLP follow.

    `mode` "pixel_shuffle" concatenates the channels of the `factor` x `factor` neighbours and loses nothing (InternVL
    1.5, https://arxiv.org/abs/2404.16821, also the source of the LayerNorm); "average" takes their mean (DeCo,
    https://arxiv.org/abs/2405.20985).
    """

    def __init__(self, vision_dim: int, llm_dim: int, *, mode: Mode = "pixel_shuffle", factor: int = 2) -> None:
        super().__init__()
        check_count("downsample", "factor", factor)
        if mode not in get_args(Mode):
            raise ValueError(f"downsample projector has no mode {mode!r}; allowed: {', '.join(get_args(Mode))}")
        self.mode = mode
        self.factor = factor
        joined_dim = vision_dim * factor**2 if mode == "pixel_shuffle" else vision_dim
        self.layers = nn.Sequential(
            nn.LayerNorm(joined_dim), nn.Linear(joined_dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim)
        )

    @property
    def token_stride(self) -> int:
        return self.factor

    def num_tokens(self, num_patches: int) -> int:
        side = grid_side("downsample", num_patches)
        if side % self.factor:
            fitting = ", ".join(str(factor) for factor in range(1, side + 1) if side % factor == 0)
            raise ValueError(
                f"downsample projector with factor {self.factor} cannot divide {num_patches} patches, a grid of "
                f"{side} x {side}; factors that fit: {fitting}"
            )
        return (side // self.factor) ** 2

    def forward(self, patches: Tensor, grid: Grid | None = None) -> Tensor:  # [B, P, Dv] -> [B, M, D]
        if grid is None:
            self.num_tokens(patches.shape[1])  # raises if the grid cannot be divided
        elif any(side % self.factor for side in patch_grid("downsample", patches.shape[1], grid)):
            raise ValueError(
                f"downsample projector with factor {self.factor} cannot divide a grid of {grid[0]} x {grid[1]} patches"
            )
        joined = pixel_shuffle(patches, self.factor, grid)  # [B, M, factor**2 * Dv]
        if self.mode == "average":
            joined = joined.unflatten(2, (self.factor**2, -1)).mean(2)  # [B, M, Dv]
        tokens: Tensor = self.layers(joined)
        return tokens
