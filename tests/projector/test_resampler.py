"""The resampler's own promises: as many tokens as queries, place kept, widths that do not fit refused."""

from __future__ import annotations

import pytest
import torch

from projector import build_projector
from projector.resampler import grid_positions


@pytest.mark.parametrize("num_queries", [1, 7, 64])
def test_the_number_of_tokens_is_the_number_of_queries_for_any_grid(num_queries: int) -> None:
    projector = build_projector("resampler", vision_dim=8, llm_dim=12, num_queries=num_queries)
    for num_patches in (1, 9, 64):
        assert projector.num_tokens(num_patches) == num_queries
        assert projector(torch.zeros(2, num_patches, 8)).shape == (2, num_queries, 12)


def test_patches_that_change_places_change_the_tokens() -> None:
    torch.manual_seed(0)
    projector = build_projector("resampler", vision_dim=32, llm_dim=12, num_queries=4)
    patches = torch.randn(1, 16, 32)
    expected = projector(patches)
    for order in (torch.arange(16).flip(0), torch.arange(16).reshape(4, 4).T.flatten()):
        assert (projector(patches[:, order]) - expected).abs().max() > 1e-3


def test_every_place_of_the_grid_has_a_position_of_its_own() -> None:
    positions = grid_positions((24, 24), 64, device=torch.device("cpu"), dtype=torch.float32)
    assert positions.shape == (576, 64)
    distances = torch.cdist(positions, positions).fill_diagonal_(torch.inf)
    assert distances.min() > 0.5


def test_positions_of_one_row_share_a_half_and_those_of_one_column_the_other() -> None:
    grid = grid_positions((5, 5), 16, device=torch.device("cpu"), dtype=torch.float32).reshape(5, 5, 16)
    assert torch.equal(grid[2, :, :8], grid[2, :1, :8].expand(5, 8))
    assert torch.equal(grid[:, 3, 8:], grid[:1, 3, 8:].expand(5, 8))
    torch.testing.assert_close(grid[3, 0, 0], torch.tensor(3.0).sin())


def test_depth_is_the_number_of_blocks() -> None:
    sizes = [
        sum(weight.numel() for weight in build_projector("resampler", vision_dim=8, llm_dim=12, depth=d).parameters())
        for d in (1, 2, 3)
    ]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_fit() -> None:
    with pytest.raises(ValueError, match=r"num_heads 5 cannot divide the vision width 12; .*fit: 1, 2, 3, 4, 6, 12"):
        build_projector("resampler", vision_dim=12, llm_dim=12, num_heads=5)


def test_a_width_without_room_for_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="divides by 4 for its 2D positions, got 6"):
        build_projector("resampler", vision_dim=6, llm_dim=12, num_heads=2)
