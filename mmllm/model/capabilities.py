"""What an LLM can do, kept as one record. Architectures do not say it, and a wrong answer is no error, so it is probed.

Each probe compares logits [B, T, V] of a few tokens. They differ by rounding alone where the LLM can do what is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.backbone_files.hub import LIBRARY_FAILURES, quiet_transformers
from mmllm.config import ConfigError
from mmllm.model.probing import HALF_TYPES, held_in_float32, probing, relative_difference
from mmllm.model.vlm import VisionLanguageModel

# How far logits that should be equal may lie apart, as a share of the largest one.
# The same kernels on tensors of one shape: rounding changes nothing, in any precision.
SAME_KERNELS = 1e-3
# Other shapes go through other kernels; the 16-bit types round at every step.
OTHER_KERNELS = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
_LARGE_LOGIT = 200.0  # far above any soft cap in use (Gemma 2: 30), far below what fp16 holds
_LENGTHS = (7, 5, 6)  # of three examples in one row
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Capabilities:
    """What one LLM can do. The first four are always true: `check_backbone` refuses an LLM that lacks one of them.

    Attributes:
        takes_embeddings: it answers from `inputs_embeds` as from the same token ids.
        left_padding, right_padding: padding on that side changes no answer.
        cache: generation with a KV cache gives what generation without one gives.
        plain_head: its logits are its head applied to the decoder's output, see `has_plain_head`.
        needs_mask: it must be given the attention mask of a batch that is padded on the right, see `needs_mask`.
        packing_refusal: why examples cannot share a row, see `why_not_packed`; None where they can.
    """

    takes_embeddings: bool = True
    left_padding: bool = True
    right_padding: bool = True
    cache: bool = True
    plain_head: bool = False
    needs_mask: bool = True
    packing_refusal: str | None = None

    def describe(self) -> str:
        """One sentence for people."""
        head = (
            "logits are its head applied to the decoder's output"
            if self.plain_head
            else "logits are not its head alone"
        )
        mask = "needs the mask of padding on the right" if self.needs_mask else "needs no mask for padding on the right"
        packing = "examples can share a row" if self.packing_refusal is None else f"not packed: {self.packing_refusal}"
        return f"takes embeddings, padding on either side and a KV cache; {head}; {mask}; {packing}"


def find_capabilities(language_model: Any) -> Capabilities:
    """The record of an LLM that `check_backbone` has accepted, as it is held now: with its adapters and attention."""
    return Capabilities(
        plain_head=has_plain_head(language_model),
        needs_mask=needs_mask(language_model),
        packing_refusal=why_not_packed(language_model),
    )


def check_backbone(model: VisionLanguageModel) -> None:
    """Raises ConfigError for an LLM that answers otherwise from embeddings, in a padded batch, or with its cache.

    The probe runs a few tokens in the precision that the LLM is held in; where that rounds too coarsely to tell, the
    logits in fp32 decide.
    """
    name = type(model.language_model).__name__
    try:
        with quiet_transformers(), probing(model):
            other = _beyond(OTHER_KERNELS[model.dtype], _spreads(model))
            if other and model.dtype in HALF_TYPES and math.isfinite(other[1]):
                with held_in_float32(model):
                    other = _beyond(OTHER_KERNELS[torch.float32], _spreads(model))
    except LIBRARY_FAILURES as error:
        if _is_bug(error):
            raise
        raise ConfigError(f"model.language: {name} cannot be used here: {error}; choose another LLM") from error
    if other:
        raise ConfigError(
            f"model.language: {name} answers otherwise {other[0]} than alone: its logits differ by {other[1]:.1%} of "
            "the largest, so training or generation would be wrong; choose another LLM"
        )


def _beyond(tolerance: float, spreads: dict[str, float]) -> tuple[str, float] | None:
    return next(((how, spread) for how, spread in spreads.items() if not spread <= tolerance), None)


def _spreads(model: VisionLanguageModel) -> dict[str, float]:
    """How far an LLM's logits are from those of the same tokens alone, by the way in which it is asked."""
    ends = model.config.text_config.eos_token_id
    special = {model.config.image_token_id, *(ends if isinstance(ends, list) else [ends])}
    words = [index for index in range(model.config.text_config.vocab_size) if index not in special][:9]
    long, short, follow = torch.tensor([words[:6]]), torch.tensor([words[3:6]]), words[6:]
    padding = torch.full((1, 3), words[0])
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    plain = [model.language_model(input_ids=ids, use_cache=False).logits for ids in (long, short)]
    right = torch.cat([long, torch.cat([short, padding], 1)])
    padded = model(input_ids=right, attention_mask=mask, use_cache=False).logits
    alone = torch.cat([_follow(model, ids, None, follow, use_cache=False) for ids in (long, short)])
    cached = torch.cat([_follow(model, ids, None, follow, use_cache=True) for ids in (long, short)])
    left = torch.cat([long, torch.cat([padding, short], 1)])
    return {
        "from embeddings": relative_difference(plain[0], model(input_ids=long, use_cache=False).logits),
        "in a batch that is padded on the right": relative_difference(plain[1], padded[1:, :3]),
        "with its cache": relative_difference(alone, cached),
        "in a batch that is padded on the left": relative_difference(
            alone, _follow(model, left, mask.flip(1), follow, use_cache=True)
        ),
    }


def _follow(model: Any, ids: Tensor, mask: Tensor | None, follow: Sequence[int], *, use_cache: bool) -> Tensor:
    """Logits [B, T, V] while generation is made to say these tokens."""
    start = ids.shape[1]
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        prefix_allowed_tokens_fn=lambda _, so_far: [follow[len(so_far) - start]],
        max_new_tokens=len(follow),
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1)


def _is_bug(error: Exception) -> bool:
    """Whether our code raised it, and not the LLM's: a wrong key or type in a frame of this package.

    Tensors that do not fit, or outputs that lack a field, are no sign of it: the LLM made them.
    """
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    is_ours = frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)
    return is_ours and isinstance(error, KeyError | TypeError)


def has_router_loss(language_model: Any) -> bool:
    """Whether the LLM's config asks for the loss that spreads tokens evenly over a mixture's experts."""
    return bool(getattr(language_model.config, "output_router_logits", False))


def has_plain_head(language_model: Any) -> bool:
    """Whether logits are just the head applied to the decoder's output: no soft cap, no scale, no loss of a router.

    Only then may the head run on supervised rows alone. The probe makes the decoder's output so large that a soft cap
    shows: small logits would pass it almost unchanged.
    """
    if has_router_loss(language_model):
        return False
    device = language_model.get_input_embeddings().weight.device
    ids = torch.arange(4, device=device)[None] % language_model.config.vocab_size
    decoder, head = language_model.get_decoder(), language_model.get_output_embeddings()

    def enlarge(module: Any, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden * (_LARGE_LOGIT / head(hidden).abs().max().clamp(min=1e-6))
        seen.append(output.last_hidden_state)
        return output

    seen: list[Tensor] = []
    with probing(language_model), decoder.register_forward_hook(enlarge):
        logits = language_model(input_ids=ids, use_cache=False).logits
        return relative_difference(head(seen[0]), logits) <= SAME_KERNELS


def needs_mask(language_model: Any) -> bool:
    """Whether an LLM must be told which positions are padding on the right.

    Where each token sees only those before it, none sees the padding, and attention without a mask skips half of its
    work. A router's loss counts padding; flash attention does not compute what a mask leaves out.
    """
    attention = getattr(language_model.config, "_attn_implementation", None) or ""
    if has_router_loss(language_model) or attention.startswith("flash"):
        return True
    device = language_model.get_input_embeddings().weight.device
    ids = torch.arange(8, device=device)[None] % language_model.config.vocab_size
    with probing(language_model):
        one, other = (
            language_model(input_ids=some, use_cache=False).logits[:, :4]
            for some in (ids, torch.cat([ids[:, :4], ids[:, 4:].flip(1)], 1))
        )
    return not relative_difference(one, other) <= SAME_KERNELS


def why_not_packed(language_model: Any) -> str | None:
    """Why examples cannot stand in one row of this LLM; None where they can.

    transformers builds a block-diagonal mask from positions that restart, if no attention mask is given and no cache
    is made; architectures do not say whether they use it. The probe changes the neighbours of an example in its row,
    and looks whether its logits change: OPT reads the neighbours, and a state-space LLM carries its state across. A
    packed row is not compared with its examples alone: those go through other kernels, whose rounding moves a real
    LLM's logits by a quarter in bf16.
    """
    if has_router_loss(language_model):
        return "the loss of its router is computed over whole rows"
    table = language_model.get_input_embeddings().weight
    embeds = table.detach()[torch.arange(sum(_LENGTHS), device=table.device) % len(table)][None]
    try:
        with probing(language_model):
            shift = _shift_by_neighbours(language_model, embeds)
    except LIBRARY_FAILURES as error:
        if _is_bug(error):
            raise
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None if shift <= SAME_KERNELS else f"an example's logits change by {shift:.1%} when its neighbours do"


def _shift_by_neighbours(language_model: Any, embeds: Tensor) -> float:
    where = torch.cat([torch.arange(length) for length in _LENGTHS])[None].to(embeds.device)
    first, middle, last = embeds.split(_LENGTHS, 1)
    others = torch.cat([first.flip(1), middle, last.flip(1)], 1)
    watched = slice(_LENGTHS[0], _LENGTHS[0] + _LENGTHS[1])
    before, after = (
        language_model(inputs_embeds=row, position_ids=where, use_cache=False).logits[:, watched]
        for row in (embeds, others)
    )
    return relative_difference(before, after)
