"""`mmllm merge`: a LoRA checkpoint becomes one whose LLM has the adapter in its weights, and the result is proven."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmllm.checkpoint.adapter import merge_adapter
from mmllm.checkpoint.card import model_card
from mmllm.checkpoint.folder import CheckpointError, check_new, load_checkpoint, read_manifest, save_checkpoint
from mmllm.checkpoint.golden import all_logits, precision_of, read_golden, require_golden, with_logits

MERGE_TOLERANCE = 1e-4  # of the largest logit


def merge_checkpoint(source: Path, out: Path, *, device: torch.device | str = "cpu") -> dict[str, float]:
    """Writes a checkpoint in which a LoRA checkpoint's adapter is part of the LLM; says by how much logits moved.

    Nothing is written where the base is not in full precision, where the adapter's own golden answers do not hold, or
    where a logit of these answers moves by more than MERGE_TOLERANCE of the largest. Raises CheckpointError or
    ConfigError.
    """
    if "base" not in read_manifest(source):
        raise CheckpointError(f"{source} holds no adapter: it is whole, and there is nothing to merge")
    check_new(out)
    model, processor, manifest = load_checkpoint(source, dtype={"language": torch.float32})
    golden = read_golden(source)
    if golden is None or not golden.answers:
        raise CheckpointError(f"{source} has no golden answers, so merged and unmerged cannot be compared")
    model.to(device)
    require_golden(model, processor, source, answers=True)
    pictures = [source / picture.file for picture in golden.pictures]
    before = all_logits(model, processor, golden, pictures)
    merge_adapter(model)
    after = all_logits(model, processor, golden, pictures)
    finite = [old.isfinite() for old in before]  # all but the image token's, which is never chosen
    moved = max(float((old - new)[kept].abs().max()) for old, new, kept in zip(before, after, finite, strict=True))
    largest = max(float(old[kept].abs().max()) for old, kept in zip(before, finite, strict=True))
    if not moved <= MERGE_TOLERANCE * largest:
        raise CheckpointError(
            f"{source} merged is not what it was: a logit moves by {moved:.3g}, and {MERGE_TOLERANCE * largest:.3g} is "
            f"allowed ({MERGE_TOLERANCE} of the largest); nothing was written"
        )
    facts: dict[str, Any] = {name: manifest[name] for name in ("origin", "settings", "figures") if name in manifest}
    facts["merged_from"] = {"path": str(source), "base": manifest["base"]}
    made = f"the adapter of `{source}` merged into its base, `{manifest['base']['source']}`"
    card = model_card(out, made, facts.get("origin", {}), facts.get("figures", {}))
    golden = replace(golden, precision=precision_of(model))
    files = with_logits(golden, {str(p.file): (source / p.file).read_bytes() for p in golden.pictures}, after)
    save_checkpoint(out, model.to("cpu"), processor, card=card, files=files, **facts)
    return {"largest_logit": largest, "moved": moved}
