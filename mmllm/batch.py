"""What travels through the pipeline: Message and Example (one conversation), Batch (tensors), and the constants.

Readers turn every file format into an Example; nothing behind them knows about formats. Shapes use `B` batch,
`T` tokens, `N` images of the whole batch, `C H W` one image, `P` patches per image, `Dv` vision width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

IGNORE_INDEX = -100
IMAGE_TOKEN = "<image>"
TEXT_ENCODING = 2  # how texts become ids: mmllm/chat/renderer.py
PICTURE_LABEL = "Picture {}: "  # what stands before each of several pictures; {} is its number, from 1

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class ImageRef:
    """The place of one image in a message: an index into the example's images."""

    index: int


Part = str | ImageRef


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and text and images in the order in which they stand.

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
    """A picture as one model takes it, so that nothing is kept of a large one: `inputs` are a batch of one."""

    size: tuple[int, int]  # (height, width) of the picture itself, upright, in pixels
    inputs: Mapping[str, Tensor]


ImageSource = str | bytes | Image.Image | PreparedImage  # a path, a file's bytes, or a picture in memory


@dataclass(frozen=True)
class Example:
    """One conversation with its images, which are read when they are needed.

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
    """A message of a text in which `<image>` marks each image, numbered from `first_image`."""
    pieces = text.split(IMAGE_TOKEN)
    parts: list[Part] = []
    for offset, piece in enumerate(pieces):
        if offset:
            parts.append(ImageRef(first_image + offset - 1))
        if piece:
            parts.append(piece)
    return Message(role, tuple(parts))


def picture_marks(num_pictures: int, label: str = PICTURE_LABEL) -> str:
    """How a question names its pictures: each on a line of its own, and labelled where they are several."""
    labels = [label.replace("{}", str(number)) if num_pictures > 1 else "" for number in range(1, num_pictures + 1)]
    return "".join(f"{one}{IMAGE_TOKEN}\n" for one in labels)


@dataclass
class Batch:
    """Tensors of several examples, padded on the right; images of all examples stand one behind the other.

    Where rows hold several examples each, `position_ids` begin with 0 at each of them, and at the padding; then the
    LLM gets those in place of `attention_mask`, which still says what is no padding.
    """

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    labels: Tensor  # [B, T], IGNORE_INDEX where nothing is learnt
    pixel_values: Tensor | None = None  # [N, C, H, W], or what the layout of the pictures says
    image_sizes: Tensor | None = None  # [N, 2] where the number of image tokens depends on the picture, see layout.py
    image_features: Tensor | None = None  # [N, P, Dv], in place of pixels where the frozen tower's output is cached
    position_ids: Tensor | None = None  # [B, T], of packed rows
    example_ids: Sequence[str] = field(default_factory=list)
    images_per_example: Sequence[int] = field(default_factory=list, init=False)  # set by a stage, for who tells of it

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @property
    def num_supervised(self) -> int:
        """Tokens that the loss sees: the first token of a row is never predicted."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())
