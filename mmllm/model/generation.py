"""Pictures in transformers' `generate`: the hooks that it calls before prefill and at each decoding step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor

from mmllm.model.layout import Layout

_OF_IMAGES = ("pixel_values", "image_features", "image_sizes")
_CACHES = ("cache", "past_key_values", "cache_params")  # from transformers 5.24 on, and before it


class ImageGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """What `generate` needs to know of pictures. The model brings the attributes."""

    config: Any  # VisionLanguageConfig
    layout: Layout
    language_inputs: frozenset[str]  # the names that the LLM's forward takes

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Pictures are passed at prefill only; later steps read them from the KV cache."""
        images = {name: kwargs.pop(name, None) for name in _OF_IMAGES}
        is_first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if "output_router_logits" in self.language_inputs:
            inputs["output_router_logits"] = False  # a loss of training; it fails on one new token after padding
        if is_first:
            return {**inputs, **images}
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        if all(getattr(cache, "is_linear", [False])):  # a state-space LLM
            inputs.pop("attention_mask", None)  # the state has absorbed the padding; the new token is not padding
        return inputs

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """The recurrent state of a state-space LLM travels under the name by which its forward takes it."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if "cache_params" in self.language_inputs and "past_key_values" in model_kwargs:
            model_kwargs["cache_params"] = model_kwargs.pop("past_key_values")

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """An answer never holds the image token: there would be no picture for its slot."""
        never = SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device)
        return LogitsProcessorList([never, *super()._get_logits_processor(*args, **kwargs)])

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Every beam or sample of a row gets that row's images, however many they are."""
        images = {name: kwargs.pop(name) for name in _OF_IMAGES if kwargs.get(name) is not None}
        if input_ids is not None and images and expand_size > 1:
            counts = self._images_of_rows(input_ids, images)
            for name, value in images.items():
                rows = value.split(counts)
                images[name] = torch.cat([row for row in rows for _ in range(expand_size)])
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**kwargs, **images}

    def _images_of_rows(self, input_ids: Tensor, images: dict[str, Tensor]) -> list[int]:
        """How many of the images stand in each row."""
        shapes = self.layout.shapes(images.get("image_sizes"))
        if self.layout.has_newline and "image_features" in images:
            raise ValueError(f"pictures laid out as {self.layout.kind} cannot be given as image_features to generate")
        num_images = len(next(iter(images.values())))
        ends = [self.layout.num_tokens(shape) for shape in shapes] or [self.config.num_image_tokens] * num_images
        behind = torch.tensor([0, *ends]).cumsum(0)  # slots behind each image
        slots = (input_ids == self.config.image_token_id).sum(1).cpu().cumsum(0)
        images_behind = torch.searchsorted(behind, slots, right=True) - 1
        return images_behind.diff(prepend=images_behind.new_zeros(1)).tolist()
