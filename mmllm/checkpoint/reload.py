"""Whether a model will come back from a checkpoint as it is: part by part it is run beside one built anew.

The other one is built in memory, from the config as a file holds it and the same weights, which are shared and not
copied. What it does otherwise would be lost at saving: tables that no file holds, or settings that no config keeps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmllm.checkpoint.folder import CheckpointError
from mmllm.model.hub import quiet_transformers
from mmllm.model.model_config import VisionLanguageConfig
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel

# How far what a part gives may differ, as a share of the largest: the same sums, in another order at most.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
NUM_WORDS = 8


@torch.no_grad()
def check_reload(model: VisionLanguageModel, processor: VisionLanguageProcessor) -> None:
    """Raises CheckpointError, naming the part, where a model loaded from a checkpoint of this one would differ."""
    tower, language = model.vision_tower.spec.source, type(model.language_model).__name__
    was_training = model.training
    again = _built_anew(model)
    models = (model.eval(), again.eval())
    pixels = processor.load_pixels([Image.linear_gradient("L").resize((96, 80)).convert("RGB")])
    sizes = pixels.get("image_sizes")
    features = _compare(f"vision tower {tower}", models, lambda one: one.encode_images(pixels["pixel_values"], sizes))
    _compare(f"projector {model.config.projector['kind']}", models, lambda one: one.project_images(features, sizes))
    words = [index for index in range(1, NUM_WORDS + 2) if index != model.config.image_token_id][:NUM_WORDS]
    _compare(f"LLM {language}", models, lambda one: one(input_ids=torch.tensor([words]), use_cache=False).logits)
    model.train(was_training)


def _built_anew(model: VisionLanguageModel) -> Any:
    """The model as `from_pretrained` builds it, on the same weights."""
    weights = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        config = VisionLanguageConfig.from_pretrained(folder)
    dtype = model.get_input_embeddings().weight.dtype
    with quiet_transformers(), torch.random.fork_rng(devices=[]):  # what is random afterwards stays as it was
        again = VisionLanguageModel.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype)
    again.load_state_dict(weights, assign=True)
    return again


def _compare(part: str, models: tuple[Any, Any], run: Callable[[Any], Tensor]) -> Tensor:
    """What the first model gives; the second has to give the same."""
    own, other = run(models[0]), run(models[1])
    dtypes = {parameter.dtype for parameter in models[0].parameters()}
    allowed = max(tolerance for dtype, tolerance in TOLERANCES.items() if dtype in dtypes)
    spread = float((own.float() - other.float()).abs().max() / own.float().abs().max())
    if not spread <= allowed:  # NaN is no agreement
        raise CheckpointError(
            f"{part}: saved and loaded again it would be another one: what it gives differs by {spread:.2g} of the "
            "largest value; something in it is neither in its weights nor computed from its config. Choose another one"
        )
    return own
