"""Place: which patches each token of the per-patch and downsampling projectors is made of, and in which layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from projector import build_projector
from projector.downsample import pixel_shuffle


def test_pixel_shuffle_joins_neighbours_row_by_row() -> None:
    # Patch p of a 4 x 4 grid has the channels (p, p + 100).
    patches = torch.stack([torch.arange(16), torch.arange(16) + 100], dim=1)[None]
    assert pixel_shuffle(patches, 2).tolist() == [
        [
            [0, 100, 1, 101, 4, 104, 5, 105],
            [2, 102, 3, 103, 6, 106, 7, 107],
            [8, 108, 9, 109, 12, 112, 13, 113],
            [10, 110, 11, 111, 14, 114, 15, 115],
        ]
    ]


@pytest.mark.parametrize("factor", [1, 2, 3, 6])
def test_pixel_shuffle_is_torchs_pixel_unshuffle_with_patches_before_channels(factor: int) -> None:
    patches = torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0))
    picture = patches.reshape(2, 6, 6, 5).permute(0, 3, 1, 2)  # [B, Dv, H, W]
    unshuffled = torch.nn.functional.pixel_unshuffle(picture, factor).flatten(2)  # [B, Dv * factor**2, M]
    expected = unshuffled.unflatten(1, (5, factor**2)).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(pixel_shuffle(patches, factor), expected)


LOCAL = [
    ("linear", {}, 1),
    ("mlp", {}, 1),
    ("downsample", {}, 2),
    ("downsample", {"factor": 3}, 3),
    ("downsample", {"mode": "average"}, 2),
    ("downsample", {"mode": "average", "factor": 3}, 3),
]


@pytest.mark.parametrize(("kind", "options", "factor"), LOCAL)
def test_each_token_depends_on_the_patches_of_its_place_and_on_no_other(
    kind: str, options: dict[str, Any], factor: int
) -> None:
    torch.manual_seed(0)
    projector = build_projector(kind, vision_dim=8, llm_dim=12, **options)
    patches = torch.randn(1, 36, 8, requires_grad=True)
    for token, tokens in enumerate(projector(patches)[0]):
        (gradient,) = torch.autograd.grad(tokens.square().sum(), patches, retain_graph=True)
        row, column = divmod(token, 6 // factor)
        expected = torch.zeros(6, 6, dtype=torch.bool)
        expected[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor] = True
        assert torch.equal((gradient[0].abs().sum(1) > 0).reshape(6, 6), expected), f"token {token}"


def test_average_sees_the_mean_of_its_neighbours_only() -> None:
    torch.manual_seed(0)
    projector = build_projector("downsample", vision_dim=8, llm_dim=12, mode="average")
    patches = torch.randn(1, 16, 8)
    swapped = patches[:, [1, 0, 2, 3, 5, 4, *range(6, 16)]]  # inside the first square
    torch.testing.assert_close(projector(patches), projector(swapped))
    picture = patches.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    means = torch.nn.functional.avg_pool2d(picture, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(projector(patches), projector.get_submodule("layers")(means))


@pytest.mark.parametrize("mode", ["pixel_shuffle", "average"])
def test_a_grid_that_the_factor_cannot_divide_is_refused_with_factors_that_fit(mode: str) -> None:
    message = "factor 2 cannot divide 81 patches, a grid of 9 x 9; factors that fit: 1, 3, 9"
    with pytest.raises(ValueError, match=message):
        build_projector("downsample", vision_dim=8, llm_dim=12, num_patches=81, mode=mode)
    projector = build_projector("downsample", vision_dim=8, llm_dim=12, mode=mode)
    with pytest.raises(ValueError, match=message):
        projector(torch.zeros(1, 81, 8))


def test_an_unknown_mode_lists_the_modes() -> None:
    with pytest.raises(ValueError, match="no mode 'max'; allowed: pixel_shuffle, average"):
        build_projector("downsample", vision_dim=8, llm_dim=12, mode="max")


def test_mlp_depth_is_the_number_of_linear_layers() -> None:
    for depth in (1, 2, 3):
        projector = build_projector("mlp", vision_dim=8, llm_dim=12, depth=depth)
        assert sum(isinstance(layer, torch.nn.Linear) for layer in projector.modules()) == depth
