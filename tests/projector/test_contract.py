"""What every row of PROJECTORS promises. A new row is tested here without a new test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from projector import PROJECTORS, Projector, build_projector

VISION_DIM, LLM_DIM = 8, 12
SQUARES = [4, 16, 36, 64]
# One rounding to bf16 is 0.4%; measured: 0.3-0.5%, and up to 3.5% behind the C-Abstractor's six blocks at this width.
MAX_BF16_ERROR = 0.05
ROOT = Path(__file__).parents[2]

every_kind = pytest.mark.parametrize("kind", PROJECTORS)


def build(kind: str, **options: Any) -> Projector:
    torch.manual_seed(0)
    return build_projector(kind, vision_dim=VISION_DIM, llm_dim=LLM_DIM, **options)


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    given, expected = given.detach().float(), expected.detach()
    return float((given - expected).norm() / expected.norm())


@every_kind
@pytest.mark.parametrize("num_patches", SQUARES)
def test_output_has_the_promised_number_of_tokens(kind: str, num_patches: int) -> None:
    projector = build(kind, num_patches=num_patches)
    out = projector(draw(3, num_patches, VISION_DIM))
    assert out.shape == (3, projector.num_tokens(num_patches), LLM_DIM)
    assert out.isfinite().all()


@every_kind
@pytest.mark.parametrize("num_patches", [0, 15, 17])
def test_patches_without_a_square_work_or_are_refused_by_name(kind: str, num_patches: int) -> None:
    projector = build(kind)
    patches = draw(2, num_patches, VISION_DIM)
    try:
        num_tokens = projector.num_tokens(num_patches)
    except ValueError:
        refusal = f"{kind} projector needs patches that fill a square grid, got {num_patches};"
        for refused in (projector.num_tokens, lambda count: build(kind, num_patches=count)):
            with pytest.raises(ValueError, match=refusal):
                refused(num_patches)
        with pytest.raises(ValueError, match=refusal):
            projector(patches)
    else:
        assert projector(patches).shape == (2, num_tokens, LLM_DIM)


@pytest.mark.parametrize("kind", ["downsample", "resampler", "c_abstractor"])
def test_projectors_that_use_place_refuse_patches_without_a_square(kind: str) -> None:
    with pytest.raises(ValueError, match=r"square grid, got 17; .*CLS"):
        build(kind, num_patches=17)


@every_kind
def test_a_grid_that_is_no_square_is_taken_as_it_is(kind: str) -> None:
    """Tokens that have a place stand row by row, as the patches do that they see most of."""
    projector = build(kind)
    patches = draw(2, 96, VISION_DIM)
    tokens = projector(patches, (4, 24))
    with pytest.raises(ValueError, match=rf"{kind} projector got 96 patches, but a grid of 5 x 5"):
        projector(patches, (5, 5))
    torch.testing.assert_close(projector(draw(2, 16, VISION_DIM), (4, 4)), projector(draw(2, 16, VISION_DIM)))
    if (stride := projector.token_stride) is None:
        return
    assert tokens.shape == (2, 96 // stride**2, LLM_DIM)
    changed = patches.clone()
    changed[:, -1] += torch.arange(VISION_DIM)  # the last column of the last row
    moved = (projector(changed, (4, 24)) - tokens).abs().sum(2).view(2, 4 // stride, 24 // stride).sum(1)
    assert (moved.argmax(1) >= 0.75 * 24 / stride).all()


@every_kind
def test_gradients_reach_every_parameter_and_every_patch(kind: str) -> None:
    projector, patches = build(kind), draw(2, 16, VISION_DIM).requires_grad_()
    out = projector(patches)
    (out * draw(*out.shape, seed=2)).sum().backward()
    without = [
        name for name, weight in projector.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert without == []
    assert patches.grad is not None
    assert (patches.grad.abs().sum(-1) > 0).all()


@every_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_no_images_give_no_tokens_but_a_zero_gradient_everywhere(kind: str, autocast: bool) -> None:
    projector = build(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = projector(torch.empty(0, 16, VISION_DIM))
    assert out.shape == (0, projector.num_tokens(16), LLM_DIM)
    out.sum().backward()
    for name, weight in projector.named_parameters():
        assert weight.grad is not None, f"{name} is not connected"
        assert weight.grad.abs().sum() == 0, name


@every_kind
@pytest.mark.parametrize("patches_dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_is_near_fp32_and_trains(kind: str, patches_dtype: torch.dtype) -> None:
    projector, patches = build(kind), draw(2, 16, VISION_DIM)
    with torch.autocast("cpu", torch.bfloat16):
        out = projector(patches.to(patches_dtype))
    assert out.dtype is torch.bfloat16
    assert relative_error(out, projector(patches)) < MAX_BF16_ERROR
    out.float().square().sum().backward()
    assert all(w.grad is not None and w.grad.dtype is torch.float32 for w in projector.parameters())
    assert all(w.grad.isfinite().all() for w in projector.parameters() if w.grad is not None)


@every_kind
def test_bf16_weights_work_without_autocast(kind: str) -> None:
    projector, patches = build(kind), draw(2, 16, VISION_DIM)
    expected = projector(patches)
    out = projector.to(torch.bfloat16)(patches.to(torch.bfloat16))
    assert out.dtype is torch.bfloat16
    assert relative_error(out, expected) < MAX_BF16_ERROR


@every_kind
def test_same_seed_same_weights_same_tokens_in_training_and_evaluation(kind: str) -> None:
    first, second, patches = build(kind), build(kind), draw(2, 16, VISION_DIM)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(first.train()(patches), second.eval()(patches))


@every_kind
def test_images_of_a_batch_do_not_see_each_other(kind: str) -> None:
    projector, patches = build(kind), draw(3, 16, VISION_DIM)
    alone = torch.cat([projector(image) for image in patches.split(1)])
    torch.testing.assert_close(projector(patches), alone, atol=1e-5, rtol=1e-5)


@every_kind
def test_saved_weights_loaded_on_meta_give_the_same_tokens(kind: str) -> None:
    projector, patches = build(kind), draw(2, 16, VISION_DIM)
    with torch.device("meta"):
        loaded = build(kind)
    loaded.load_state_dict(projector.state_dict(), strict=True, assign=True)
    assert torch.equal(loaded(patches), projector(patches))


@every_kind
def test_every_projector_learns_what_is_where(kind: str) -> None:
    """Four shapes on a 2 x 2 quartered grid: the quarter of the one that differs is read off the tokens."""
    projector = build(kind)
    readout = torch.nn.Linear(LLM_DIM * projector.num_tokens(16), 4)
    optimizer = torch.optim.AdamW([*projector.parameters(), *readout.parameters()], lr=3e-3)
    generator, contents = torch.Generator().manual_seed(3), draw(2, VISION_DIM, seed=4)
    quarter_of_patch = torch.tensor([0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2)
    accuracy = 0.0
    for _ in range(150):
        quarters = torch.randint(4, (64,), generator=generator)
        patches = contents[(quarter_of_patch == quarters[:, None]).long()]  # [B, P, Dv]
        logits = readout(projector(patches).flatten(1))
        accuracy = float((logits.argmax(1) == quarters).float().mean())
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, quarters).backward()
        optimizer.step()
    assert accuracy > 0.95


def test_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(ValueError, match="no projector of kind 'MLP'; allowed: linear, mlp, downsample"):
        build_projector("MLP", vision_dim=8, llm_dim=12)


@every_kind
def test_unknown_option_is_refused_and_the_allowed_ones_are_listed(kind: str) -> None:
    options = PROJECTORS[kind].__init__.__kwdefaults__ or {}
    with pytest.raises(ValueError, match=f"{kind} projector has no option 'dept'; allowed: ") as caught:
        build(kind, dept=2)
    listed = str(caught.value).partition("allowed: ")[2]
    assert listed == (", ".join(f"{name} (default {default!r})" for name, default in options.items()) or "none")


@every_kind
def test_positional_arguments_are_no_options(kind: str) -> None:
    with pytest.raises(ValueError, match="has no option 'self'"):
        build(kind, self=1)


@every_kind
@pytest.mark.parametrize("bad", [0, -1, "two", 2.5, True])
def test_counts_that_are_no_counts_are_refused_by_name(kind: str, bad: object) -> None:
    defaults = PROJECTORS[kind].__init__.__kwdefaults__ or {}
    counts = [name for name, default in defaults.items() if not isinstance(default, str)]
    for option in counts:
        with pytest.raises(ValueError, match=f"{kind} projector needs {option} to be a whole number >= 1, got {bad!r}"):
            build(kind, **{option: bad})
    for width in ("vision_dim", "llm_dim"):
        with pytest.raises(ValueError, match=f"needs {width} to be a whole number >= 1"):
            build_projector(kind, **{"vision_dim": 8, "llm_dim": 12, width: bad})  # type: ignore[arg-type]


def test_package_imports_and_runs_on_torch_alone() -> None:
    """In a fresh interpreter that finds torch and `projector` but refuses every other part of this project."""
    program = """
import sys
import torch
before = set(sys.modules)
import projector
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new <= {"projector", "torch", *sys.stdlib_module_names}, new
for kind in projector.PROJECTORS:
    projector.build_projector(kind, vision_dim=8, llm_dim=12)(torch.zeros(1, 16, 8))
foreign = {"transformers", "open_clip", "mmllm", "torchvision", "accelerate", "pydantic"} & set(sys.modules)
assert not foreign, foreign
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
