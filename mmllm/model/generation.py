"""Pictures in transformers' `generate`: the hooks that it calls before prefill and at each decoding step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor

from mmllm.model.image_tokens import Layout

_IMAGE_INPUTS = ("pixel_values", "image_features", "image_sizes")
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # `cache` since transformers 5.24


class ImageGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """Overrides the hooks of `generate` for pictures. The model class provides the attributes below."""

    config: Any  # VisionLanguageConfig
    layout: Layout
    language_inputs: frozenset[str]  # the names that the LLM's forward takes

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Pictures are passed at prefill only; later steps read them from the KV cache."""
        images = {name: kwargs.pop(name, None) for name in _IMAGE_INPUTS}
        is_first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if "output_router_logits" in self.language_inputs:
            inputs["output_router_logits"] = False  # for a training loss only; fails on one new token after padding
        if is_first:
            return {**inputs, **images}
        cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        if all(getattr(cache, "is_linear", [False])):  # a state-space LLM
            inputs.pop("attention_mask", None)  # the state has absorbed the padding; the new token is not padding
        return inputs

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """Passes the recurrent state of a state-space LLM under the name that its forward takes."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if "cache_params" in self.language_inputs and "past_key_values" in model_kwargs:
            model_kwargs["cache_params"] = model_kwargs.pop("past_key_values")

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Suppresses the image token in answers: its slot would have no picture."""
        suppress_image_token = SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device)
        return LogitsProcessorList([suppress_image_token, *super()._get_logits_processor(*args, **kwargs)])

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Repeats the images of each row for every beam or sample of that row."""
        images = {name: kwargs.pop(name) for name in _IMAGE_INPUTS if kwargs.get(name) is not None}
        if input_ids is not None and images and expand_size > 1:
            counts = self._images_of_rows(input_ids, images)
            for name, value in images.items():
                rows = value.split(counts)
                images[name] = torch.cat([row for row in rows for _ in range(expand_size)])
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**kwargs, **images}

    def _images_of_rows(self, input_ids: Tensor, images: dict[str, Tensor]) -> list[int]:
        """The number of images in each row of `input_ids` [B, T].

        Raises ValueError for `image_features` in a layout that needs `image_sizes`.
        """
        shapes = self.layout.shapes(images.get("image_sizes"))
        if self.layout.has_newline and "image_features" in images:
            raise ValueError(f"pictures laid out as {self.layout.kind} cannot be given as image_features to generate")
        num_images = len(next(iter(images.values())))
        token_counts = [self.layout.num_tokens(shape) for shape in shapes] or [
            self.config.num_image_tokens
        ] * num_images
        image_ends = torch.tensor([0, *token_counts]).cumsum(0)  # image slots up to the end of each image
        row_ends = (input_ids == self.config.image_token_id).sum(1).cpu().cumsum(0)  # up to the end of each row
        images_so_far = torch.searchsorted(image_ends, row_ends, right=True) - 1
        return images_so_far.diff(prepend=images_so_far.new_zeros(1)).tolist()
