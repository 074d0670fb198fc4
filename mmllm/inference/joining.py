"""Whether rows of an LLM's KV cache can join other rows while they are being decoded. A probe tells: no config does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmllm.backbone_files.hub import LIBRARY_FAILURES, quiet_transformers
from mmllm.inference.kv_cache import KVCache, next_logits
from mmllm.model.capabilities import OTHER_KERNELS
from mmllm.model.probing import HALF_TYPES, held_in_float32, probing, relative_difference
from mmllm.model.vlm import VisionLanguageModel

_LENGTHS = (3, 7)  # of the row that runs, and of the longer one that joins it
_NUM_NEW = 2  # tokens that both decode together


@dataclass(frozen=True)
class Joining:
    """What the probe found: the cache's size, and why rows cannot join; None where they can."""

    bytes_per_token: int  # 0 where unknown
    refusal: str | None = None


def probe_joining(model: VisionLanguageModel) -> Joining:
    """Decodes two rows apart and joined, and compares their logits."""
    if "past_key_values" not in model.language_inputs:
        return Joining(0, "its state is not a KV cache")
    try:
        with quiet_transformers(), probing(model):
            spread, size = _compare(model)
            if not spread <= OTHER_KERNELS[model.dtype] and model.dtype in HALF_TYPES:
                with held_in_float32(model):
                    spread, _ = _compare(model)
                    tolerance = OTHER_KERNELS[torch.float32]
            else:
                tolerance = OTHER_KERNELS[model.dtype]
    except LIBRARY_FAILURES as error:
        return Joining(0, str(error).splitlines()[0] if str(error) else type(error).__name__)
    if spread <= tolerance:
        return Joining(size)
    return Joining(size, f"its logits change by {spread:.1%} when a row joins another")


def _compare(model: VisionLanguageModel) -> tuple[float, int]:
    """(largest relative difference of the logits, bytes of the cache for each token)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    text = (torch.arange(sum(_LENGTHS) + 2 * _NUM_NEW, device=model.device) * 7 + 1) % vocabulary
    prompts = text[: sum(_LENGTHS)].split(_LENGTHS)
    follow = text[sum(_LENGTHS) :].reshape(2, _NUM_NEW)
    alone, caches = [], []
    for prompt, new in zip(prompts, follow, strict=True):
        apart, joins = KVCache([0]), KVCache([0])
        for cache in (apart, joins):
            next_logits(model, cache, [len(prompt)], input_ids=prompt[None])
        caches.append(joins)
        steps = enumerate(new, len(prompt) + 1)
        alone.append(torch.cat([next_logits(model, apart, [end], input_ids=token[None, None]) for end, token in steps]))
    running = caches[0]
    running.join(caches[1])
    joined = [
        next_logits(model, running, [length + step + 1 for length in _LENGTHS], input_ids=follow[:, step, None])
        for step in range(_NUM_NEW)
    ]
    return relative_difference(torch.stack(alone), torch.stack(joined, 1)), running.bytes_per_token
