"""Checkpoints of ours that become a Llava, Llavas of transformers that come in, and the logits of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mmllm.batch import IMAGE_TOKEN, Example, message
from mmllm.checkpoint.folder import save_checkpoint
from mmllm.config import ModelConfig
from mmllm.inference.engine import Engine
from mmllm.interop.import_llava import ImportOptions, import_model
from mmllm.interop.parity import TransformersComparison
from mmllm.interop.parts import ModelImportError
from mmllm.model.build import build_model
from tests.builders.llava_parts import ENCODER

PICTURES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (50, 30 + n, 3), dtype=np.uint8)) for n in (1, 2)]


def checkpoint(folder: Path, vision: str, projector: dict[str, Any], language: Path, **options: Any) -> Path:
    config = ModelConfig.model_validate(
        {
            "vision": {"source": vision, "image_mode": "pad", **options},
            "projector": projector,
            "language": {"source": str(language), "attention": "eager"},
            "template": "tokenizer",
        }
    )
    torch.manual_seed(3)
    model, processor, origin = build_model(config)
    for parameter in model.projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    save_checkpoint(folder, model, processor, card="", origin=origin)
    return folder


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32]]  # [height, width]; 96 wide and 32 high is left out
TURNS = (message("user", "<image>\nwhat is it?"), message("assistant", "a red"), message("user", "and <image>?", 1))
ASKED = Example("x", "", TURNS, tuple(PICTURES))
# llava-hf's way of writing: contents are lists, pictures first
LISTS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for part in m.content if part.type == 'image' %}<image>\n"
    "{% endfor %}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def llava(
    parts: Path, folder: Path, vision: str, language: str, tokenizer: Any, *, kind: str = "Llava", **options: Any
) -> Any:
    """A Llava or LlavaNext as transformers saves one, of these parts."""
    encoder = transformers.AutoModel.from_pretrained(parts / vision)
    llm = transformers.AutoModelForCausalLM.from_pretrained(parts / language)
    strategy = "default" if vision == "clip" else "full"
    sizes = {"image_grid_pinpoints": PINPOINTS} if kind == "LlavaNext" else {}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=encoder.config, text_config=llm.config, image_seq_length=16,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), vision_feature_layer=-2,
        **{"vision_feature_select_strategy": strategy, **sizes, **options},
    )  # fmt: skip
    torch.manual_seed(4)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    transform = transformers.AutoImageProcessor.from_pretrained(parts / vision)
    if kind == "LlavaNext":
        side = {"height": ENCODER["image_size"], "width": ENCODER["image_size"]}
        transform = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": ENCODER["image_size"]}, crop_size=side, image_grid_pinpoints=PINPOINTS,
            image_mean=transform.image_mean, image_std=transform.image_std,
        )  # fmt: skip
    getattr(transformers, f"{kind}Processor")(
        transform, tokenizer, patch_size=8, vision_feature_select_strategy=strategy, chat_template=LISTS,
        num_additional_image_tokens=int(vision == "clip"),
    ).save_pretrained(folder)  # fmt: skip
    return model


def logits(folder: Path, example: Example = ASKED) -> torch.Tensor:
    engine = Engine.load(folder, device="cpu")
    with torch.inference_mode():
        return engine.model(**engine.inputs([engine.renderer.render_example(example)], list(example.images))).logits


def logits_there(model: Any, folder: Path, out: Path) -> torch.Tensor:
    """transformers' own, for the same tokens, with its own pixels."""
    transform = transformers.AutoImageProcessor.from_pretrained(folder)
    engine = Engine.load(out, device="cpu")
    ids = engine.inputs([engine.renderer.render_example(ASKED)], [])["input_ids"]
    with torch.inference_mode():
        return model(input_ids=ids, **transform(PICTURES, return_tensors="pt")).logits


def imported(source: Path, out: Path, **options: Any) -> TransformersComparison | None:
    return import_model(str(source), out, ImportOptions(**options))


def refused(source: Path | str, out: Path, **options: Any) -> str:
    with pytest.raises(ModelImportError) as caught:
        import_model(str(source), out, ImportOptions(**options))
    assert not out.exists()
    assert not out.with_name(out.name + ".part").exists()
    return str(caught.value)
