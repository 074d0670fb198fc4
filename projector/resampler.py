"""A fixed number of tokens from any number of patches: learned queries read the patches by cross attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from projector.contract import Grid, Projector, check_count, grid_side, patch_grid

FEED_FORWARD_RATIO = 4  # Flamingo's code and most transformers: the hidden layer is four times as wide
MAX_PERIOD = 10000.0  # of the sines; https://arxiv.org/abs/1706.03762, section 3.5


def grid_positions(grid: Grid, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:  # [P, width]
    """Sines and cosines of each patch's row and column, row by row. `width` must divide by 4.

    Source: MAE's 2D position embedding, https://arxiv.org/abs/2111.06377
    """
    steps = torch.arange(max(grid), device=device, dtype=torch.float32)
    powers = torch.arange(width // 4, device=device, dtype=torch.float32) / (width // 4)
    angles = steps[:, None] * MAX_PERIOD**-powers  # [longest side, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [longest side, width / 2]
    rows = waves[: grid[0], None].expand(*grid, -1)
    columns = waves[None, : grid[1]].expand(*grid, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(dtype)


class CrossAttention(nn.Module):
    """Queries attend to the patches and to each other, as Flamingo's do."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, patches: Tensor, positions: Tensor) -> Tensor:
        """queries [B, M, Dv], patches [B, P, Dv], positions [P, Dv] -> [B, M, Dv]"""
        queries = self.norm_queries(queries)
        # Positions are added after the norm, so that they weigh the same whatever the scale of the tower's features.
        positioned = self.norm_patches(patches) + positions
        key, value = self.to_key_value(torch.cat([positioned, queries], dim=1)).chunk(2, dim=2)
        heads = [x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (self.to_query(queries), key, value)]
        attended = functional.scaled_dot_product_attention(*heads)  # [B, heads, M, Dv / heads]
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


class ResamplerBlock(nn.Module):
    """Cross attention and a feed-forward layer, both residual and pre-norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = CrossAttention(width, num_heads)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, FEED_FORWARD_RATIO * width, bias=False),
            nn.GELU(),
            nn.Linear(FEED_FORWARD_RATIO * width, width, bias=False),
        )

    def forward(self, queries: Tensor, patches: Tensor, positions: Tensor) -> Tensor:  # -> [B, M, Dv]
        queries = queries + self.attention(queries, patches, positions)
        out: Tensor = queries + self.feed_forward(queries)
        return out


class ResamplerProjector(Projector):
    """`num_queries` learned queries read the patches in `depth` blocks, then one linear layer: M == num_queries.

    Papers: Flamingo's Perceiver resampler, https://arxiv.org/abs/2204.14198, which runs at the width of the vision
    tower. The 2D positions of the patches are from Qwen-VL, https://arxiv.org/abs/2308.12966: attention alone does not
    know where a patch is.
    """

    def __init__(
        self, vision_dim: int, llm_dim: int, *, num_queries: int = 64, depth: int = 2, num_heads: int = 8
    ) -> None:
        super().__init__()
        for option, value in (("num_queries", num_queries), ("depth", depth), ("num_heads", num_heads)):
            check_count("resampler", option, value)
        if vision_dim % num_heads:
            fitting = ", ".join(str(heads) for heads in range(1, min(vision_dim, 32) + 1) if vision_dim % heads == 0)
            raise ValueError(
                f"resampler projector with num_heads {num_heads} cannot divide the vision width {vision_dim}; "
                f"num_heads that fit: {fitting}"
            )
        if vision_dim % 4:
            raise ValueError(
                f"resampler projector needs a vision width that divides by 4 for its 2D positions, got {vision_dim}"
            )
        self.queries = nn.Parameter(torch.randn(num_queries, vision_dim))
        self.blocks = nn.ModuleList(ResamplerBlock(vision_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(vision_dim)
        self.out = nn.Linear(vision_dim, llm_dim)

    def num_tokens(self, num_patches: int) -> int:
        grid_side("resampler", num_patches)
        return len(self.queries)

    def forward(self, patches: Tensor, grid: Grid | None = None) -> Tensor:  # [B, P, Dv] -> [B, M, D]
        batch, num_patches, width = patches.shape
        grid = patch_grid("resampler", num_patches, grid)
        # Computed here and not a buffer: a buffer outside the checkpoint is lost when weights load on `meta`.
        positions = grid_positions(grid, width, device=patches.device, dtype=patches.dtype)
        queries = self.queries.expand(batch, -1, -1)
        for block in self.blocks:
            queries = block(queries, patches, positions)
        tokens: Tensor = self.out(self.norm(queries))
        return tokens
