"""The processor beside the model: tokenizer, image transform and chat template, saved with the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AutoProcessor, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images

from mmllm.batch import IMAGE_TOKEN
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
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        template: str = "tokenizer",
        num_image_tokens: int = 0,
        layout: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.template = template
        self.num_image_tokens = num_image_tokens
        self.layout = layout
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As ProcessorMixin's, without special tokens around the text: the chat template writes them all.

        Said in the call, since no class attribute says it to every version of transformers.
        """
        if "add_special_tokens" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Raises ValueError where the text has more or fewer `<image>` than there are pictures.

        Older versions of transformers would leave pictures out without a word.
        """
        if text is not None:
            marks = sum(one.count(IMAGE_TOKEN) for one in ([text] if isinstance(text, str) else text))
            pictures = 0 if images is None else len(make_flat_list_of_images(images))
            if marks != pictures:
                raise ValueError(
                    f"{marks} {IMAGE_TOKEN} in the text but {pictures} images were given; give one for each, in order"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

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
