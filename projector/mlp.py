"""Per-patch projectors: every patch becomes one LLM token, so M == P."""

from __future__ import annotations

from torch import Tensor, nn

from projector.contract import Grid, Projector, check_count, patch_grid


class LinearProjector(Projector):
    """One linear layer. Paper: LLaVA, https://arxiv.org/abs/2304.08485"""

    def __init__(self, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(vision_dim, llm_dim)

    @property
    def token_stride(self) -> int:
        return 1

    def num_tokens(self, num_patches: int) -> int:
        return num_patches

    def forward(self, patches: Tensor, grid: Grid | None = None) -> Tensor:  # [B, P, Dv] -> [B, P, D]
        if grid is not None:
            patch_grid("linear", patches.shape[1], grid)
        tokens: Tensor = self.layer(patches)
        return tokens


class MLPProjector(Projector):
    """`depth` linear layers with GELU between them. Paper: LLaVA-1.5, https://arxiv.org/abs/2310.03744"""

    def __init__(self, vision_dim: int, llm_dim: int, *, depth: int = 2) -> None:
        super().__init__()
        check_count("mlp", "depth", depth)
        layers: list[nn.Module] = [nn.Linear(vision_dim, llm_dim)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(llm_dim, llm_dim)]
        self.layers = nn.Sequential(*layers)

    @property
    def token_stride(self) -> int:
        return 1

    def num_tokens(self, num_patches: int) -> int:
        return num_patches

    def forward(self, patches: Tensor, grid: Grid | None = None) -> Tensor:  # [B, P, Dv] -> [B, P, D]
        if grid is not None:
            patch_grid("mlp", patches.shape[1], grid)
        tokens: Tensor = self.layers(patches)
        return tokens
