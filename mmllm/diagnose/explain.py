"""`mmllm explain`: what the model will see and be taught from one example, and whether it is asked the same way later.

No weights of an LLM are loaded: tokens come from the renderer, pictures from the tower's transform.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmllm.batch import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    Example,
    ImageRef,
    ImageSource,
    Message,
    PreparedImage,
    picture_marks,
)
from mmllm.chat.conversation import Conversation
from mmllm.chat.renderer import RenderedConversation, Renderer
from mmllm.config import ConfigError, DataConfig, ModelConfig, StageConfig
from mmllm.config.file import load_config
from mmllm.data.check import why_left_out
from mmllm.data.sources import DataError, read_source
from mmllm.diagnose.check import load_text_side
from mmllm.images import image_size, load_image
from mmllm.inference.seen import as_seen, preview
from mmllm.model.layout import Layout
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vision import load_tower

PREVIEW_PX = 2048  # the longer side of a stored picture, as it is shown

Kind = Literal["image", "prompt", "answer", "end"]


@dataclass(frozen=True)
class Token:
    """One token of a conversation; `text` is the part of the text that it stands for."""

    id: int
    text: str
    kind: Kind
    is_supervised: bool = False


@dataclass(frozen=True)
class ExplainedPicture:
    """A picture of the example, upright as it is stored, and as the vision tower sees it.

    `stored` is made smaller where it is large; `stored_px` is its true (width, height).
    """

    name: str
    stored_px: tuple[int, int]
    stored: Image.Image
    seen: Image.Image


@dataclass(frozen=True)
class Asked:
    """The prompt of one answer: what stands before it in training, and what chat, captioning and evaluation would ask.

    `inference` is None where nobody can ask so, since a question without words is refused.
    """

    answer: str
    training: list[Token]
    inference: list[Token] | None

    @property
    def differs_at(self) -> int | None:
        """The first position at which the two prompts differ; None where they are equal."""
        if self.inference is None:
            return 0
        there, here = ([token.id for token in tokens] for tokens in (self.training, self.inference))
        if there == here:
            return None
        same = (index for index, pair in enumerate(zip(there, here, strict=False)) if pair[0] != pair[1])
        return next(same, min(len(there), len(here)))


@dataclass(frozen=True)
class Explanation:
    """Everything about one example that a run on these settings would make of it."""

    config: str
    split: str
    example: Example
    also_in: list[str]  # further data files that have an example of this id
    template: str
    max_length_tokens: int
    tokens: list[Token]
    pictures: list[ExplainedPicture]
    prompts: list[Asked]
    picture_label: str

    @property
    def counts(self) -> dict[str, int]:
        """Tokens of each kind, all, and those that the loss sees."""
        found = Counter(token.kind for token in self.tokens)
        kinds: tuple[Kind, ...] = ("image", "prompt", "answer", "end")
        num_supervised = sum(token.is_supervised for token in self.tokens)
        return {**{kind: found[kind] for kind in kinds}, "total": len(self.tokens), "supervised": num_supervised}

    @property
    def verdict(self) -> str:
        """One sentence on the inference prompts."""
        wrong, num = sum(asked.differs_at is not None for asked in self.prompts), len(self.prompts)
        if not wrong:
            answers = "its answer" if num == 1 else f"its {num} answers"
            return f"equal: chat, captioning and evaluation ask for {answers} with the tokens of training"
        answers = "its answer" if num == 1 else f"{wrong} of its {num} answers"
        return f"different: {answers} would be asked for with other tokens than in training"

    @property
    def reasons(self) -> list[str]:
        """Why inference prompts of this example can differ from training."""
        found = []
        if self.example.messages[0].role == "system":
            found.append("it has a system turn, and chat, captioning and evaluation send none")
        users = [message for message in self.example.messages if message.role == "user"]
        if any(_words(message, self.picture_label) is None for message in users):
            found.append(
                "its pictures do not stand before the words as the chat puts them: each <image> on a line of its own"
            )
        return found if any(asked.differs_at is not None for asked in self.prompts) else []

    def to_json(self) -> dict[str, Any]:
        """The explanation for programs, without the pixels."""
        return {
            "config": self.config,
            "id": self.example.id,
            "split": self.split,
            "source": self.example.source,
            "also_in": self.also_in,
            "template": self.template,
            "max_length_tokens": self.max_length_tokens,
            "counts": self.counts,
            "tokens": [vars(token) for token in self.tokens],
            "pictures": [
                {"name": picture.name, "stored_px": picture.stored_px, "seen_px": picture.seen.size}
                for picture in self.pictures
            ],
            "prompts": [
                {
                    "answer": asked.answer,
                    "differs_at": asked.differs_at,
                    "training": [token.id for token in asked.training],
                    "inference": None if asked.inference is None else [token.id for token in asked.inference],
                }
                for asked in self.prompts
            ],
            "equal": all(asked.differs_at is None for asked in self.prompts),
        }


def runs(tokens: Sequence[Token]) -> Iterator[tuple[int, list[Token]]]:
    """Neighbours of one kind, with the position of the first."""
    start = 0
    for index in range(1, len(tokens) + 1):
        if index == len(tokens) or tokens[index].kind != tokens[start].kind:
            yield start, list(tokens[start:index])
            start = index


def explain(config_path: Path, overrides: list[str], *, sample: str | None = None) -> Explanation:
    """What a run of these settings makes of the example with this id, or of the first one.

    Raises ConfigError for settings without data or an id that is not there, DataError for an example that the run
    would leave out, ImageError for a picture that cannot be read.
    """
    config = load_config(config_path, overrides)
    if not isinstance(config, StageConfig):
        raise ConfigError(f"{config_path} is for {config.stage}, which makes its own data; there is nothing to explain")
    split, example, also_in = _find(config.data, sample)
    text_side = load_text_side(config.model)
    renderer = text_side.renderer
    if reason := why_left_out(example, renderer, config.data, max_positions=text_side.max_positions):
        raise DataError(f"{example.source}: the run would leave out {example.id}: {reason}")
    transform = _transform(config.model, text_side.layout)
    rendered = renderer.render_example(example)
    pictures = [
        _picture(image, f"picture {number}", text_side.layout, transform)
        for number, image in enumerate(example.images, start=1)
    ]
    return Explanation(
        str(config_path),
        split,
        example,
        also_in,
        renderer.template_name,
        config.data.max_length_tokens,
        tokenise(rendered, renderer.image_token_id),
        pictures,
        _prompts(renderer, example, rendered, text_side.picture_label),
        text_side.picture_label,
    )


def _picture(image: ImageSource, unnamed: str, layout: Layout, transform: Any) -> ExplainedPicture:
    assert not isinstance(image, PreparedImage), "what is read from data is no prepared picture"
    picture, size = load_image(image, may_shrink=True), image_size(image)
    seen = as_seen(layout, transform, PreparedImage(size, layout.prepare(transform, picture, size)))
    return ExplainedPicture(
        image if isinstance(image, str) else unnamed, size[::-1], preview(picture, PREVIEW_PX), seen
    )


def _transform(config: ModelConfig, layout: Layout) -> Any:
    if config.checkpoint:
        return VisionLanguageProcessor.from_pretrained(config.checkpoint).image_processor
    assert config.vision
    return layout.image_processor(load_tower(config.vision).spec, config.vision.fit)


def _find(data: DataConfig, sample: str | None) -> tuple[str, Example, list[str]]:
    """(split, example, other files that have the id), train before val."""
    found: list[tuple[str, Example]] = []
    bad: list[str] = []
    ids: list[str] = []
    replay = (data.replay,) if data.replay else ()
    for split, sources in (("train", (*data.train, *replay)), ("val", data.val)):
        for source in sources:
            read = read_source(source)
            if sample is None and len(read.examples):
                return split, read.examples[0], []
            own = list(read.examples.ids())
            ids += own
            found += [(split, read.examples[index]) for index, name in enumerate(own) if name == sample]
            bad += [f"{row.source} row {row.row}: {row.reason}" for row in read.bad if sample in (None, row.id)]
    if found:
        return *found[0], [example.source for _, example in found[1:]]
    if bad:
        shown = f"--sample {sample}" if sample else "every row"
        raise DataError(f"the run would leave out {shown}: {bad[0]}")
    near = ", ".join(_near(sample or "", ids)) or "none"
    raise ConfigError(f"--sample: no example {sample!r} among the {len(ids):,} of train and val; near it: {near}")


def _near(sample: str, ids: Sequence[str]) -> list[str]:
    """The ids that begin and end most like this one. difflib would compare every character of a million ids."""

    def num_shared(one: str, other: str) -> int:
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))

    def likeness(other: str) -> int:
        return num_shared(sample, other) + num_shared(sample[::-1], other[::-1])

    return [other for other in heapq.nlargest(5, ids, key=likeness) if 2 * likeness(other) >= len(sample)]


def tokenise(rendered: RenderedConversation, image_token_id: int) -> list[Token]:
    """The tokens of a conversation as the renderer gives them, each with its text and what it is for."""
    kinds: list[Kind] = ["prompt"] * len(rendered.input_ids)
    for answer in rendered.answers:
        kinds[answer.start : answer.content_end] = ["answer"] * (answer.content_end - answer.start)
        kinds[answer.content_end : answer.end] = ["end"] * (answer.end - answer.content_end)
    labels = [IGNORE_INDEX, *rendered.labels[1:]]  # nothing predicts the first token
    texts = rendered.texts
    for place, text in enumerate(texts[1:], start=1):
        if rendered.input_ids[place] == image_token_id and text != IMAGE_TOKEN:  # blanks that no token is for
            texts[place - 1] += text.removesuffix(IMAGE_TOKEN)
    return [
        Token(token_id, IMAGE_TOKEN, "image")
        if token_id == image_token_id
        else Token(token_id, text, kind, label != IGNORE_INDEX)
        for token_id, text, kind, label in zip(rendered.input_ids, texts, kinds, labels, strict=True)
    ]


def _words(message: Message, label: str) -> str | None:
    """A question's words where its pictures stand before them, as the chat puts them; None where they do not."""
    marked = "".join(IMAGE_TOKEN if isinstance(part, ImageRef) else part for part in message.parts)
    marks = picture_marks(marked.count(IMAGE_TOKEN), label)
    return marked.removeprefix(marks) if marked.startswith(marks) else None


def _prompts(renderer: Renderer, example: Example, rendered: RenderedConversation, label: str) -> list[Asked]:
    """For each answer the tokens before it, in training and as a conversation that grows turn by turn would ask."""
    conversation = Conversation(label=label)
    asked: list[Asked] = []
    tokens = tokenise(rendered, renderer.image_token_id)
    turns = [message for message in example.messages if message.role != "system"]
    for number, place in zip(range(0, len(turns), 2), rendered.answers, strict=True):
        question, answer = turns[number], turns[number + 1]
        words = _words(question, label)
        text = question.text if words is None else words
        pictures = [example.images[part.index] for part in question.parts if isinstance(part, ImageRef)]
        inference = None
        if text.strip():
            question_now = renderer.render_example(conversation.ask(text, pictures))
            inference = tokenise(question_now, renderer.image_token_id)
        asked.append(Asked(answer.text, tokens[: place.start], inference))
        conversation.add(text, pictures, answer.text)
    return asked
