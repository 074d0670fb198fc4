"""The processor beside the model: tokenizer, image transform and chat template, saved with the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AutoProcessor, ProcessorMixin

from mmllm.batch import IMAGE_TOKEN, PICTURE_LABEL
from mmllm.model.layout import Layout, build_layout


class VisionLanguageProcessor(ProcessorMixin):  # type: ignore[misc]
    """Text with `<image>` marks and pictures -> `input_ids`, `attention_mask`, `pixel_values`, `image_sizes`.

    The last only where the number of image tokens depends on the picture.

    Args:
        image_processor: the tower's transform.
        tokenizer: the LLM's tokenizer, with `<image>` in its vocabulary.
        chat_template: Jinja text that gives what the renderer of `template` gives.
        template: the renderer's template, a key of TEMPLATES or `tokenizer`.
        num_image_tokens: image tokens that stand for one view of the tower.
        layout: how a picture becomes several views, or one of another shape; None: each is one view.
        picture_label: what stands before each of several pictures of a question; `{}` is its number.
        encoding: how texts become ids, see Renderer; checkpoints that do not say it are of the first way.
    """

    text_kwargs = {"add_special_tokens": False}  # the chat template writes them all, as the renderer does

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        template: str = "tokenizer",
        num_image_tokens: int = 0,
        layout: dict[str, Any] | None = None,
        picture_label: str = PICTURE_LABEL,
        encoding: int = 1,
        **kwargs: Any,
    ):
        self.template = template
        self.num_image_tokens = num_image_tokens
        self.layout = layout
        self.picture_label, self.encoding = picture_label, encoding
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def unused_input_names(self) -> list[str]:
        """What tokenizers give and no causal LM takes."""
        return ["token_type_ids"]

    @property
    def image_layout(self) -> Layout:
        """How pictures become views and tokens."""
        return build_layout(self.num_image_tokens, self.layout)

    def image_inputs(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """What the model takes of these pictures: float32 pixels, and `image_sizes` where they count."""
        inputs = self.image_layout.inputs(self.image_processor(list(pictures), return_tensors="pt"))
        return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        processed, marks = super()._process_images(images, **kwargs)
        return self.image_layout.inputs(processed), marks

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What one `<image>` becomes before tokenisation."""
        layout = self.image_layout
        sizes = layout.inputs(image_inputs).get("image_sizes")
        one, two = (0, 0) if sizes is None else sizes[image_idx]
        return IMAGE_TOKEN * layout.num_tokens((int(one), int(two)))


AutoProcessor.register("mmllm", VisionLanguageProcessor, exist_ok=True)
