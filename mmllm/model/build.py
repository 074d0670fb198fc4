"""A new model out of its parts: pretrained tower, fresh projector, pretrained LLM."""

from __future__ import annotations

from typing import Any

import torch

from mmllm.batch import IMAGE_TOKEN
from mmllm.config import ConfigError, ModelConfig
from mmllm.model.language import check_backbone, find_architecture, load_language
from mmllm.model.processor import VisionLanguageProcessor, image_processor
from mmllm.model.vision import load_tower
from mmllm.model.vlm import VisionLanguageConfig, VisionLanguageModel
from projector import build_projector


def build_model(config: ModelConfig) -> tuple[VisionLanguageModel, VisionLanguageProcessor, dict[str, Any]]:
    """(model, processor, where each part came from). Raises ConfigError where parts are missing or do not fit.

    The number of image tokens is counted by running the tower and the projector once.
    """
    assert config.vision is not None
    assert config.projector is not None
    assert config.language is not None
    assert config.template is not None
    find_architecture(config.language)  # before anything large is read
    tower = load_tower(config.vision)
    language_model, tokenizer = load_language(config.language)
    width = language_model.config.get_text_config().hidden_size
    try:
        projector = build_projector(
            config.projector.kind,
            vision_dim=tower.width,
            llm_dim=width,
            num_patches=tower.num_patches,
            **config.projector.options,
        )
    except ValueError as error:
        raise ConfigError(f"model.projector: {error}") from error
    with torch.no_grad():
        num_image_tokens = projector(torch.zeros(1, tower.num_patches, tower.width)).shape[1]
    model_config = VisionLanguageConfig(
        vision=tower.spec.to_json(),
        projector={"kind": config.projector.kind, "options": dict(config.projector.options)},
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        num_image_tokens=num_image_tokens,
    )
    model = VisionLanguageModel.assemble(model_config, tower, projector, language_model)
    check_backbone(model)
    processor = VisionLanguageProcessor(
        image_processor(tower.spec, config.vision.fit),
        tokenizer,
        chat_template=tokenizer.chat_template,
        template=config.template,
        num_image_tokens=num_image_tokens,
    )
    origin = {
        "vision": tower.spec.source,
        "projector": config.projector.kind,
        "language": config.language.source + (f"@{config.language.revision}" if config.language.revision else ""),
    }
    return model, processor, origin
