"""Builds a new model from its parts: pretrained tower, new projector, pretrained LLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmllm.backbone_files.gguf import described_source
from mmllm.batch import IMAGE_TOKEN, PICTURE_LABEL, TEXT_ENCODING
from mmllm.config import ConfigError, ModelConfig, ProjectorConfig, VisionConfig
from mmllm.model.capabilities import check_backbone
from mmllm.model.image_tokens import new_layout
from mmllm.model.language import find_architecture, load_language
from mmllm.model.model_config import VisionLanguageConfig
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.tower import VisionTower
from mmllm.model.vision import load_tower
from mmllm.model.vlm import VisionLanguageModel
from projector import Projector, build_projector


def build_model(config: ModelConfig) -> tuple[VisionLanguageModel, VisionLanguageProcessor, dict[str, Any]]:
    """Builds (model, processor, source of each part). Raises ConfigError where a part is missing or does not fit."""
    assert config.vision is not None
    assert config.projector is not None
    assert config.language is not None
    assert config.template is not None
    find_architecture(config.language)  # before anything large is read
    tower = load_tower(config.vision)
    language_model, tokenizer = load_language(config.language)
    width = language_model.config.get_text_config().hidden_size
    projector = fitting_projector(config.projector, tower, width)
    model, processor = assemble_model(
        tower, projector, language_model, tokenizer, kind=config.projector, vision=config.vision,
        template=config.template, picture_label=config.picture_label,
    )  # fmt: skip
    origin = {
        "vision": tower.spec.source,
        "projector": config.projector.kind,
        "language": described_source(config.language.source, config.language.revision),
    }
    return model, processor, origin


def fitting_projector(config: ProjectorConfig, tower: VisionTower, llm_dim: int) -> Projector:
    """A new projector from the tower's width to `llm_dim`. Raises ConfigError for options that do not fit the tower."""
    try:
        return build_projector(
            config.kind, vision_dim=tower.width, llm_dim=llm_dim, num_patches=tower.num_patches, **config.options
        )
    except ValueError as error:
        raise ConfigError(f"model.projector: {error}") from error


@torch.no_grad()
def count_image_tokens(tower: VisionTower, projector: Projector) -> int:
    """Image tokens per view, counted by running the projector once on the tower's number of patches."""
    parameter = next(projector.parameters())
    tokens: Tensor = projector(parameter.new_zeros(1, tower.num_patches, tower.width))
    return tokens.shape[1]


def assemble_model(
    tower: VisionTower,
    projector: Projector,
    language_model: Any,
    tokenizer: Any,
    *,
    kind: ProjectorConfig,
    vision: VisionConfig,
    template: str,
    image_newline: Tensor | None = None,
    picture_label: str | None = None,
) -> tuple[VisionLanguageModel, VisionLanguageProcessor]:
    """The model around these parts, none of them copied, and its processor.

    Of `vision` only the layout is read: `image_mode`, `tile_grids` and `max_image_tokens`.
    """
    num_image_tokens = count_image_tokens(tower, projector)
    layout = new_layout(vision, tower, projector, num_image_tokens)
    config = VisionLanguageConfig(
        vision=tower.spec.to_json(),
        projector={"kind": kind.kind, "options": dict(kind.options)},
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        num_image_tokens=num_image_tokens,
        layout=layout.to_json(),
    )
    model = VisionLanguageModel.assemble(config, tower, projector, language_model, image_newline=image_newline)
    check_backbone(model)
    processor = VisionLanguageProcessor(
        layout.image_processor(tower.spec, vision.image_mode),
        tokenizer,
        chat_template=tokenizer.chat_template,
        template=template,
        num_image_tokens=num_image_tokens,
        layout=layout.to_json(),
        picture_label=PICTURE_LABEL if picture_label is None else picture_label,
        encoding=TEXT_ENCODING,
    )
    return model, processor
