"""What programs that generate with the weights need beside them: chat template, end tokens, padding token."""

from __future__ import annotations

from mmllm.chat.renderer import Renderer
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel


def end_token_ids(model: VisionLanguageModel, renderer: Renderer) -> list[int]:
    """The tokens that end an answer: the renderer's, and others that the checkpoint's or LLM's config lists with it.

    Llama 3 ends a turn with one token and a text with another; a model tuned from it may write either.
    """
    language_model = model.language_model
    for settings in (model.generation_config, language_model.generation_config, language_model.config):
        end_ids = settings.eos_token_id
        if isinstance(end_ids, list) and renderer.end_token_id in end_ids:
            return end_ids
    return [renderer.end_token_id]


def write_generation_settings(
    model: VisionLanguageModel, processor: VisionLanguageProcessor, renderer: Renderer
) -> None:
    """Makes the processor's chat template and the model's generation config agree with the renderer."""
    processor.chat_template = renderer.saved_template(processor.picture_label)
    end_ids = end_token_ids(model, renderer)
    settings = model.generation_config
    settings.eos_token_id = end_ids if len(end_ids) > 1 else renderer.end_token_id
    settings.pad_token_id = int(processor.tokenizer.pad_token_id)
