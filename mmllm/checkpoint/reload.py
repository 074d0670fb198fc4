"""Whether a model loads from a checkpoint unchanged: each part runs beside the same part of a rebuilt model.

The rebuilt model is made in memory, from the saved form of the config, and shares the weights. Where the two differ,
saving would lose something: a table that is not among the weights, or a setting that is not in the config.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmllm.backbone_files.hub import quiet_transformers
from mmllm.checkpoint.folder import CheckpointError
from mmllm.model.model_config import VisionLanguageConfig
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel

# How far the outputs of a part may differ, relative to the largest: only the order of additions may change.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
NUM_TOKENS = 8


@torch.no_grad()
def check_reload(model: VisionLanguageModel, processor: VisionLanguageProcessor) -> None:
    """Raises CheckpointError, which names the part, where a model loaded from a checkpoint of this one would differ."""
    tower, language = model.vision_tower.spec.source, type(model.language_model).__name__
    was_training = model.training
    rebuilt = _rebuild(model)
    models = (model.eval(), rebuilt.eval())
    pixels = processor.load_pixels([Image.linear_gradient("L").resize((96, 80)).convert("RGB")])
    sizes = pixels.get("image_sizes")
    features = _compare(f"vision tower {tower}", models, lambda m: m.encode_images(pixels["pixel_values"], sizes))
    _compare(f"projector {model.config.projector['kind']}", models, lambda m: m.project_images(features, sizes))
    token_ids = [index for index in range(1, NUM_TOKENS + 2) if index != model.config.image_token_id][:NUM_TOKENS]
    _compare(f"LLM {language}", models, lambda m: m(input_ids=torch.tensor([token_ids]), use_cache=False).logits)
    model.train(was_training)


def _rebuild(model: VisionLanguageModel) -> Any:
    """A second model as `from_pretrained` builds it, with the same weights."""
    weights = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        config = VisionLanguageConfig.from_pretrained(folder)
    dtype = model.get_input_embeddings().weight.dtype
    with quiet_transformers(), torch.random.fork_rng(devices=[]):  # later random numbers stay the same
        rebuilt = VisionLanguageModel.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype)
    rebuilt.load_state_dict(weights, assign=True)
    return rebuilt


def _compare(part: str, models: tuple[Any, Any], run: Callable[[Any], Tensor]) -> Tensor:
    """The output of the first model. Raises CheckpointError where the second one's differs."""
    output, rebuilt_output = run(models[0]), run(models[1])
    dtypes = {parameter.dtype for parameter in models[0].parameters()}
    allowed = max(tolerance for dtype, tolerance in TOLERANCES.items() if dtype in dtypes)
    difference = float((output.float() - rebuilt_output.float()).abs().max() / output.float().abs().max())
    if not difference <= allowed:  # also for NaN
        raise CheckpointError(
            f"{part}: saved and loaded again it would differ: its outputs move by {difference:.2g} of the largest "
            "value, since a part of it is neither in its weights nor computed from its config. Choose another one"
        )
    return output
