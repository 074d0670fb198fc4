"""The C-Abstractor's own promises: a square number of tokens, pooled as torch pools, each token at its place."""

from __future__ import annotations

import pytest
import torch

from projector import build_projector
from projector.c_abstractor import average_pool


def test_a_quarter_of_the_patches_by_default_and_the_chosen_number_else() -> None:
    projector = build_projector("c_abstractor", vision_dim=8, llm_dim=12)
    assert [projector.num_tokens(num_patches) for num_patches in (576, 64, 9, 1)] == [144, 16, 4, 1]
    chosen = build_projector("c_abstractor", vision_dim=8, llm_dim=12, num_tokens=9)
    for num_patches in (9, 25, 64):
        assert chosen(torch.zeros(2, num_patches, 8)).shape == (2, 9, 12)


@pytest.mark.parametrize(("side", "token_side"), [(8, 4), (7, 3), (24, 12), (5, 5), (5, 1), (10, 7)])
def test_pooling_is_torchs_adaptive_average_pooling(side: int, token_side: int) -> None:
    grid = torch.randn(2, side, side, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2), token_side).permute(0, 2, 3, 1)
    torch.testing.assert_close(average_pool(grid, (token_side, token_side)), expected)


def test_a_token_depends_the_more_on_patches_the_nearer_they_are_to_its_place() -> None:
    torch.manual_seed(0)
    projector = build_projector("c_abstractor", vision_dim=32, llm_dim=12, num_tokens=16, depth=1)
    patches = torch.randn(8, 144, 32, requires_grad=True)
    out = projector(patches)
    influences: dict[int, list[float]] = {0: [], 1: [], 2: [], 3: []}  # by distance, in tokens
    for token in range(16):
        (gradient,) = torch.autograd.grad(out[:, token].square().sum(), patches, retain_graph=True)
        influence = gradient.abs().sum((0, 2)).reshape(4, 3, 4, 3).sum((1, 3))  # of each place, [4, 4]
        for place in range(16):
            distance = max(abs(token // 4 - place // 4), abs(token % 4 - place % 4))
            influences[distance].append(float(influence[place // 4, place % 4]))
    near, next_to_it, far, farthest = (sum(values) / len(values) for values in influences.values())
    assert near > 1.2 * next_to_it
    assert next_to_it > 2 * far
    assert far > farthest


def test_the_scale_of_the_features_does_not_matter() -> None:
    torch.manual_seed(0)
    projector = build_projector("c_abstractor", vision_dim=32, llm_dim=12)
    patches = torch.randn(2, 16, 32)
    torch.testing.assert_close(projector(50 * patches), projector(patches), atol=1e-3, rtol=1e-3)


def test_neighbours_are_mixed_before_and_after_pooling() -> None:
    torch.manual_seed(0)
    projector = build_projector("c_abstractor", vision_dim=8, llm_dim=12, num_tokens=64, depth=1)
    patches = torch.randn(1, 64, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(projector(patches)[0, 0].square().sum(), patches)
    influence = gradient[0].abs().sum(1).reshape(8, 8)
    # Two 3 x 3 convolutions reach two patches far; behind that only the gate's mean is left.
    assert influence[:3, :3].min() > influence[3:, 3:].max()


def test_tokens_that_fill_no_square_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(ValueError, match="square number, got 50; nearest: 49 and 64"):
        build_projector("c_abstractor", vision_dim=8, llm_dim=12, num_tokens=50)


def test_more_tokens_than_patches_are_refused() -> None:
    message = "cannot make 144 tokens from 64 patches; set num_tokens to 64 or less"
    with pytest.raises(ValueError, match=message):
        build_projector("c_abstractor", vision_dim=8, llm_dim=12, num_tokens=144, num_patches=64)
    with pytest.raises(ValueError, match=message):
        build_projector("c_abstractor", vision_dim=8, llm_dim=12, num_tokens=144)(torch.zeros(1, 64, 8))
