"""What turns conversations into prompts, read without the LLM: its weights stay on disk."""

from __future__ import annotations

from dataclasses import dataclass

from mmllm.backbone_files.gguf import local_source
from mmllm.batch import IMAGE_TOKEN, PICTURE_LABEL, TEXT_ENCODING
from mmllm.chat.renderer import Renderer
from mmllm.checkpoint.folder import read_manifest
from mmllm.config import ModelConfig
from mmllm.model.build import count_image_tokens, fitting_projector
from mmllm.model.image_tokens import Layout, new_layout
from mmllm.model.language import load_tokenizer
from mmllm.model.model_config import VisionLanguageConfig
from mmllm.model.positions import position_limit_of
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vision import load_tower


@dataclass(frozen=True)
class PromptSetup:
    """Renderer and image layout of a model, and the lengths that its LLM can take."""

    renderer: Renderer
    layout: Layout
    max_positions: int | None  # the longest row that the LLM accepts; None where it has no limit
    picture_label: str
    trained_length_tokens: int | None  # the longest row that the LLM was made for, where its config says so


def load_prompt_setup(config: ModelConfig) -> PromptSetup:
    """Reads tokenizer, chat template, image layout and configs of a model.

    Raises ValueError, OSError, RuntimeError or KeyError where a part is missing or cannot be read.
    """
    if config.checkpoint:
        read_manifest(config.checkpoint)
        processor = VisionLanguageProcessor.from_pretrained(config.checkpoint)
        tokenizer, layout = processor.tokenizer, processor.image_layout
        template, saved = config.template or processor.template, processor.chat_template
        encoding = TEXT_ENCODING if config.template else processor.encoding
        label = processor.picture_label
        text_config = VisionLanguageConfig.from_pretrained(config.checkpoint).text_config
    else:
        from transformers import AutoConfig

        assert config.vision
        assert config.projector
        assert config.language
        assert config.template
        language = config.language
        tokenizer = load_tokenizer(
            language.source, revision=language.revision, extra_special_tokens=language.extra_special_tokens
        )
        text_config = AutoConfig.from_pretrained(local_source(language.source), revision=language.revision)
        tower = load_tower(config.vision)
        projector = fitting_projector(config.projector, tower, text_config.hidden_size)
        layout = new_layout(config.vision, tower, projector, count_image_tokens(tower, projector))
        template, saved, encoding, label = config.template, None, TEXT_ENCODING, PICTURE_LABEL
    renderer = Renderer(
        tokenizer,
        template,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        num_image_tokens=layout.num_image_tokens,
        encoding=encoding,
        saved_jinja=saved,
    )
    renderer.require_end()
    trained_length = getattr(text_config, "max_position_embeddings", None)
    label = label if config.picture_label is None else config.picture_label
    return PromptSetup(renderer, layout, position_limit_of(text_config), label, trained_length)
