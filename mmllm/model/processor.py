"""The processor beside the model: tokenizer, image transform and chat template, saved with the checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, LlavaImageProcessor, ProcessorMixin

from mmllm.batch import IMAGE_TOKEN
from mmllm.model.tower import INTERPOLATIONS, TowerSpec


def image_processor(spec: TowerSpec, fit: str) -> LlavaImageProcessor:
    """The transform of a tower: `square` crops the middle, `pad` pads with the mean color, `stretch` ignores aspect.

    All three end in [C, H, W] of the tower's own size, mean and standard deviation.
    """
    side = {"height": spec.image_size_px, "width": spec.image_size_px}
    return LlavaImageProcessor(
        do_pad=fit == "pad",
        size={"shortest_edge": spec.image_size_px} if fit == "square" else side,
        do_center_crop=fit == "square",
        crop_size=side,
        resample=INTERPOLATIONS[spec.interpolation],
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )


class VisionLanguageProcessor(ProcessorMixin):  # type: ignore[misc]
    """Text with `<image>` marks and pictures -> `input_ids`, `attention_mask`, `pixel_values`.

    Args:
        image_processor: the tower's transform.
        tokenizer: the LLM's tokenizer, with `<image>` in its vocabulary.
        chat_template: Jinja text that gives what the renderer of `template` gives.
        template: the renderer's template, a key of TEMPLATES or `tokenizer`.
        num_image_tokens: image tokens that stand for one picture.
    """

    text_kwargs = {"add_special_tokens": False}  # the chat template writes them all, as the renderer does

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        template: str = "tokenizer",
        num_image_tokens: int = 0,
        **kwargs: Any,
    ):
        self.template = template
        self.num_image_tokens = num_image_tokens
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def unused_input_names(self) -> list[str]:
        """What tokenizers give and no causal LM takes."""
        return ["token_type_ids"]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What one `<image>` becomes before tokenisation."""
        return self.image_token * self.num_image_tokens


AutoProcessor.register("mmllm", VisionLanguageProcessor, exist_ok=True)
