"""What is saved beside the weights for whoever generates with them: chat template, end tokens, padding token."""

from __future__ import annotations

from mmllm.chat.renderer import Renderer
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel


def end_token_ids(model: VisionLanguageModel, renderer: Renderer) -> list[int]:
    """The tokens that end an answer: the renderer's, and those that the LLM or the checkpoint names beside it.

    Llama 3 ends a turn with one token and a text with another; a model tuned from it may say either.
    """
    language_model = model.language_model
    for settings in (model.generation_config, language_model.generation_config, language_model.config):
        ends = settings.eos_token_id
        if isinstance(ends, list) and renderer.end_token_id in ends:
            return ends
    return [renderer.end_token_id]


def write_generation_settings(
    model: VisionLanguageModel, processor: VisionLanguageProcessor, renderer: Renderer
) -> None:
    """Sets the processor's chat template and the model's generation config to what the renderer does."""
    processor.chat_template = renderer.saved_template(processor.picture_label)
    ends = end_token_ids(model, renderer)
    settings = model.generation_config
    settings.eos_token_id = ends if len(ends) > 1 else renderer.end_token_id
    settings.pad_token_id = int(processor.tokenizer.pad_token_id)
