"""What every projector has: the base class `Projector`, the grid of its patches, and the check of its counts."""

from __future__ import annotations

import math

from torch import Tensor, nn

Grid = tuple[int, int]  # rows and columns


class Projector(nn.Module):
    """Turns the patches of an image into tokens of the LLM; the module docstring of `projector` states the contract."""

    @property
    def token_stride(self) -> int | None:
        """Patches along one side of the square that becomes a token; None where tokens have no place in the picture."""
        return None

    def num_tokens(self, num_patches: int) -> int:
        """M for P. Raises ValueError where this projector cannot take so many patches."""
        raise NotImplementedError(f"{type(self).__name__} must define num_tokens")

    def forward(self, patches: Tensor, grid: Grid | None = None) -> Tensor:  # [B, P, Dv] -> [B, M, D]
        raise NotImplementedError(f"{type(self).__name__} must define forward")


def grid_side(kind: str, num_patches: int) -> int:
    """Patches along one side of the square grid. Raises ValueError if their number is not a square."""
    side = math.isqrt(max(num_patches, 0))
    if side < 1 or side * side != num_patches:
        raise ValueError(
            f"{kind} projector needs patches that fill a square grid, got {num_patches}; "
            "use square images, keep only the patch tokens (no CLS), or use kind 'mlp' or 'linear'"
        )
    return side


def patch_grid(kind: str, num_patches: int, grid: Grid | None) -> Grid:
    """`grid`, or the square one where it is None. Raises ValueError where the patches do not fill it."""
    if grid is None:
        side = grid_side(kind, num_patches)
        return side, side
    if grid[0] * grid[1] != num_patches:
        raise ValueError(f"{kind} projector got {num_patches} patches, but a grid of {grid[0]} x {grid[1]}")
    return grid


def check_count(kind: str, option: str, value: object) -> None:
    """Raises ValueError where an option that counts something is not a whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{kind} projector needs {option} to be a whole number >= 1, got {value!r}")
