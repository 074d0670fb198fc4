"""The processor beside the model: tokenizer, image transform and chat template, saved with the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images

from mmllm.batch import IMAGE_TOKEN, PICTURE_LABEL, ImageSource, PreparedImage
from mmllm.chat.renderer import Renderer
from mmllm.images import image_size, load_image
from mmllm.kernels.large_pictures import MAX_ORDINARY_PIXELS
from mmllm.model.image_tokens import Layout, build_layout


class VisionLanguageProcessor(ProcessorMixin):  # type: ignore[misc]
    """Text with `<image>` marks and pictures -> `input_ids`, `attention_mask`, `pixel_values`, `image_sizes`.

    `image_sizes` is given only where the number of image tokens depends on the picture.

    Args:
        image_processor: the tower's transform.
        tokenizer: the LLM's tokenizer, with `<image>` in its vocabulary.
        chat_template: Jinja text that renders what the renderer of `template` renders.
        template: the renderer's template, a key of TEMPLATES or `tokenizer`.
        num_image_tokens: image tokens per view of the tower.
        layout: of `Layout.to_json`: how a picture becomes views; None: each is one square view.
        picture_label: text before each picture of a question that has several; `{}` is the picture's number.
        encoding: version of the rules from texts to ids, see Renderer; 1 for checkpoints that name none.
    """

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

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As ProcessorMixin's, without special tokens around the text: the chat template writes them all.

        Set per call, since no class attribute works in every version of transformers.
        """
        if "add_special_tokens" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Raises ValueError where the text has more or fewer `<image>` than there are pictures.

        Older versions of transformers would drop pictures silently.
        """
        if text is not None:
            marks = sum(prompt.count(IMAGE_TOKEN) for prompt in ([text] if isinstance(text, str) else text))
            pictures = 0 if images is None else len(make_flat_list_of_images(images))
            if marks != pictures:
                raise ValueError(
                    f"{marks} {IMAGE_TOKEN} in the text but {pictures} images were given; give one for each, in order"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of tokenizers that no causal LM takes."""
        return ["token_type_ids"]

    @property
    def image_layout(self) -> Layout:
        """How pictures become views and tokens."""
        return build_layout(self.num_image_tokens, self.layout)

    def image_inputs(self, pictures: Iterable[Image.Image | PreparedImage]) -> dict[str, Tensor]:
        """The model's inputs for these pictures: float32 `pixel_values`, and `image_sizes` where the layout needs them.

        Small pictures are processed together, large ones one by one. `pictures` is consumed lazily.
        """
        layout, processed = self.image_layout, list[dict[str, Tensor]]()
        waiting: list[Image.Image] = []
        for picture in pictures:
            is_large = isinstance(picture, PreparedImage) or self._is_large(layout, picture)
            if is_large or sum(math.prod(small.size) for small in waiting) > MAX_ORDINARY_PIXELS:
                processed += self._process(layout, waiting)
                waiting = []
            if isinstance(picture, PreparedImage):
                processed.append(dict(picture.inputs))
            elif is_large:
                processed.append(dict(self.prepare(picture).inputs))
            else:
                waiting.append(picture)
        processed += self._process(layout, waiting)
        return processed[0] if len(processed) == 1 else layout.join(processed)

    def load_prepared(self, image: ImageSource | Path) -> PreparedImage:
        """Reads a picture into the model's inputs, and keeps nothing else of it. Raises ImageError."""
        if isinstance(image, PreparedImage):
            return image
        return self.prepare(load_image(image, may_shrink=True), image_size(image))

    def load_pixels(self, images: Iterable[ImageSource | Path]) -> dict[str, Tensor]:
        """Reads pictures into the model's inputs: float32 `pixel_values` [N, C, H, W], and `image_sizes` where needed.

        Large ones are read and shrunk one by one. Raises ImageError for a file that is not a picture.
        """
        return self.image_inputs(self._loaded(image) for image in images)

    def _loaded(self, image: ImageSource | Path) -> Image.Image | PreparedImage:
        if isinstance(image, PreparedImage):
            return image
        picture, size = load_image(image, may_shrink=True), image_size(image)
        return picture if picture.size == size[::-1] else self.prepare(picture, size)

    def build_renderer(self) -> Renderer:
        """The renderer for this processor's tokenizer, template and image tokens. Raises ChatError."""
        return Renderer(
            self.tokenizer,
            self.template,
            image_token_id=self.image_token_id,
            num_image_tokens=self.image_layout.num_image_tokens,
            encoding=self.encoding,
            saved_jinja=self.chat_template,
        )

    def prepare(self, picture: Image.Image, size: tuple[int, int] | None = None) -> PreparedImage:
        """The model's inputs for one picture. `size` is its original (height, width), if it was shrunk when read."""
        size = size or (picture.height, picture.width)
        return PreparedImage(size, _as_float32(self.image_layout.prepare(self.image_processor, picture, size)))

    def _is_large(self, layout: Layout, picture: Image.Image) -> bool:
        return layout.num_pixels(self.image_processor, (picture.height, picture.width)) > MAX_ORDINARY_PIXELS

    def _process(self, layout: Layout, pictures: list[Image.Image]) -> list[dict[str, Tensor]]:
        return [_as_float32(layout.inputs(self.image_processor(pictures, return_tensors="pt")))] if pictures else []

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        processed, marks = super()._process_images(images, **kwargs)
        return self.image_layout.inputs(processed), marks

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What one `<image>` becomes before tokenization."""
        layout = self.image_layout
        sizes = layout.inputs(image_inputs).get("image_sizes")
        first, second = (0, 0) if sizes is None else sizes[image_idx]
        return IMAGE_TOKEN * layout.num_tokens((int(first), int(second)))


def _as_float32(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


AutoProcessor.register("mmllm", VisionLanguageProcessor, exist_ok=True)
