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

    def image_inputs(self, pictures: Iterable[Image.Image | PreparedImage]) -> dict[str, Tensor]:
        """What the model takes of these pictures: float32 pixels, and `image_sizes` where they count.

        Small pictures are processed together and large ones one by one, each asked for when it is its turn.
        """
        layout, done = self.image_layout, list[dict[str, Tensor]]()
        waiting: list[Image.Image] = []
        for picture in pictures:
            is_large = isinstance(picture, PreparedImage) or self._is_large(layout, picture)
            if is_large or sum(math.prod(one.size) for one in waiting) > MAX_ORDINARY_PIXELS:
                done += self._process(layout, waiting)
                waiting = []
            if isinstance(picture, PreparedImage):
                done.append(dict(picture.inputs))
            elif is_large:
                done.append(dict(self.prepare(picture).inputs))
            else:
                waiting.append(picture)
        done += self._process(layout, waiting)
        return done[0] if len(done) == 1 else layout.join(done)

    def load_prepared(self, image: ImageSource | Path) -> PreparedImage:
        """A picture as the model takes it, and the only thing that stays of it. Raises ImageError."""
        if isinstance(image, PreparedImage):
            return image
        return self.prepare(load_image(image, may_shrink=True), image_size(image))

    def load_pixels(self, images: Iterable[ImageSource | Path]) -> dict[str, Tensor]:
        """Pictures as the model takes them: `pixel_values` [N, C, H, W] in float32, and `image_sizes` where they count.

        Large ones are read and made small one by one. Raises ImageError for what is no picture.
        """
        return self.image_inputs(self._loaded(image) for image in images)

    def _loaded(self, image: ImageSource | Path) -> Image.Image | PreparedImage:
        if isinstance(image, PreparedImage):
            return image
        picture, size = load_image(image, may_shrink=True), image_size(image)
        return picture if picture.size == size[::-1] else self.prepare(picture, size)

    def build_renderer(self) -> Renderer:
        """The renderer that this processor describes: its tokenizer, template and image tokens. Raises ChatError."""
        return Renderer(
            self.tokenizer,
            self.template,
            image_token_id=self.image_token_id,
            num_image_tokens=self.image_layout.num_image_tokens,
            encoding=self.encoding,
            saved_jinja=self.chat_template,
        )

    def prepare(self, picture: Image.Image, size: tuple[int, int] | None = None) -> PreparedImage:
        """One picture as the model takes it. `size` is its (height, width), where it was made smaller when read."""
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
        """What one `<image>` becomes before tokenisation."""
        layout = self.image_layout
        sizes = layout.inputs(image_inputs).get("image_sizes")
        one, two = (0, 0) if sizes is None else sizes[image_idx]
        return IMAGE_TOKEN * layout.num_tokens((int(one), int(two)))


def _as_float32(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


AutoProcessor.register("mmllm", VisionLanguageProcessor, exist_ok=True)
