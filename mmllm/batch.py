"""What travels through the pipeline: Message and Example (one conversation), Batch (tensors), and the constants.

Readers turn every file format into an Example; nothing after them knows about formats. Shapes use `B` batch,
`T` tokens, `N` images of the whole batch, `C H W` one image, `P` patches per image, `Dv` vision width.

An `<image>` in a text is a mark: the place of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

if TYPE_CHECKING:  # its import takes seconds, and drawing and reading do without
    import torch
    from torch import Tensor

IGNORE_INDEX = -100
IMAGE_TOKEN = "<image>"
TEXT_ENCODING = 2  # version of how texts become token ids, see mmllm/chat/renderer.py
PICTURE_LABEL = "Picture {}: "  # precedes each of several pictures; {} is its number, from 1

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ImageRef:
    """The place of one image in a message: an index into the example's images."""

    index: int


Part = str | ImageRef


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and the texts and images of the turn in order.

    Example:
        import mmllm

        turn = mmllm.Message("user", ("What color is the circle?",))
        print(turn.text)
    """

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The message's text without its images."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A picture that is already preprocessed for one model, so that a large original need not stay in memory."""

    size: tuple[int, int]  # (height, width) of the upright original, in pixels
    inputs: Mapping[str, Tensor]  # a batch of one


ImageSource = str | bytes | Image.Image | PreparedImage  # a path, a file's bytes, or a picture in memory


@dataclass(frozen=True)
class Example:
    """One conversation and its images, which are read when they are needed.

    An image is a path, the bytes of a file, or a Pillow image. `Conversation.ask` makes an Example of a dialogue.

    Example:
        import mmllm

        question = mmllm.Message("user", ("Which shapes can you name?",))
        example = mmllm.Example("question-1", "my questions", (question,))
        print(mmllm.load("runs/tiny/stage2").reply(example).text)
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()


def message(role: Role, text: str, first_image: int = 0) -> Message:
    """A message of a text in which each `<image>` is the mark of one image, numbered from `first_image`."""
    pieces = text.split(IMAGE_TOKEN)
    parts: list[Part] = []
    for offset, piece in enumerate(pieces):
        if offset:
            parts.append(ImageRef(first_image + offset - 1))
        if piece:
            parts.append(piece)
    return Message(role, tuple(parts))


def picture_marks(num_pictures: int, label: str = PICTURE_LABEL) -> str:
    """The marks of a question's pictures: each on a line of its own, with a label where there are several."""
    labels = [label.replace("{}", str(number)) if num_pictures > 1 else "" for number in range(1, num_pictures + 1)]
    return "".join(f"{text}{IMAGE_TOKEN}\n" for text in labels)


@dataclass
class Batch:
    """Tensors of several examples, padded on the right. The images of all examples follow each other along `N`.

    Where rows are packed, `position_ids` restart at 0 in each example and in the padding. The LLM gets them in place
    of `attention_mask`, which still marks what is not padding.
    """

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    labels: Tensor  # [B, T], IGNORE_INDEX where there is no loss
    pixel_values: Tensor | None = None  # [N, C, H, W], or as mmllm/model/image_tokens.py says
    image_sizes: Tensor | None = None  # [N, 2], where the number of image tokens depends on the picture
    image_features: Tensor | None = None  # [N, P, Dv], instead of pixels where the frozen tower's output is cached
    position_ids: Tensor | None = None  # [B, T], for packed rows
    example_ids: Sequence[str] = field(default_factory=list)
    images_per_example: Sequence[int] = field(default_factory=list, init=False)  # set by a stage, for reports

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        from torch import Tensor

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def num_supervised(self) -> int:
        """The number of tokens with a loss. The first token of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())
