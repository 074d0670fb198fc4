"""Projectors: modules that turn the patch features of a vision tower into LLM tokens. Needs torch and nothing else.

Every class in PROJECTORS keeps one contract:

    projector = build_projector(kind, vision_dim=Dv, llm_dim=D, **options)
    projector(patches[B, P, Dv], grid=None) -> [B, M, D]        projector.num_tokens(P) -> M

- Patches come row by row, without CLS. Projectors that use the places of patches assume a square grid, or get `grid`
  (rows, columns), and raise ValueError where the patches do not fill it.
- `token_stride` is None, or tokens come row by row too, each from a square of so many patches along each side.
- Images do not see each other: row b of the output depends on row b of the patches alone.
- B may be 0 (a batch without images): the output is [0, M, D] and every parameter gets a gradient, of zeros.
- Weights in fp32 or bf16, and bf16 autocast; no dropout, so the same patches give the same tokens.

A new projector is a class `(vision_dim, llm_dim, *, options)` derived from Projector and a row in PROJECTORS.
"""

from __future__ import annotations

import inspect
from typing import Any

from projector.c_abstractor import CAbstractorProjector
from projector.contract import Projector, check_count
from projector.downsample import DownsampleProjector
from projector.mlp import LinearProjector, MLPProjector
from projector.resampler import ResamplerProjector

__all__ = ["PROJECTORS", "Projector", "build_projector"]

PROJECTORS: dict[str, type[Projector]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "downsample": DownsampleProjector,
    "resampler": ResamplerProjector,
    "c_abstractor": CAbstractorProjector,
}


def build_projector(
    kind: str, *, vision_dim: int, llm_dim: int, num_patches: int | None = None, **options: Any
) -> Projector:
    """The projector of PROJECTORS[kind] with its options, freshly initialised.

    With `num_patches`, which is what the vision tower gives per image, a projector that cannot take so many patches
    fails here and not at the first image. Raises ValueError for an unknown kind, an unknown option, or a value that is
    not allowed.
    """
    if kind not in PROJECTORS:
        raise ValueError(f"no projector of kind {kind!r}; allowed: {', '.join(PROJECTORS)}")
    parameters = inspect.signature(PROJECTORS[kind]).parameters.values()
    allowed = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    if unknown := [option for option in options if option not in allowed]:
        listed = ", ".join(f"{name} (default {default!r})" for name, default in allowed.items()) or "none"
        raise ValueError(f"{kind} projector has no option {', '.join(map(repr, unknown))}; allowed: {listed}")
    check_count(kind, "vision_dim", vision_dim)
    check_count(kind, "llm_dim", llm_dim)
    projector_class: Any = PROJECTORS[kind]  # the options of each differ; they are checked above
    projector: Projector = projector_class(vision_dim, llm_dim, **options)
    if num_patches is not None:
        projector.num_tokens(num_patches)
    return projector
