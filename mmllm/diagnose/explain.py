"""`mmllm explain`: tokens, labels and pictures of one training example, and whether inference builds the same prompts.

Tokens come from the renderer, pictures from the vision tower's image transform. The LLM's weights are not loaded.
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
from mmllm.diagnose.prompt_setup import load_prompt_setup
from mmllm.images import image_size, load_image
from mmllm.inference.preview import preview, shrink
from mmllm.model.image_tokens import Layout
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vision import load_tower

PREVIEW_PX = 2048  # the longer side at which a stored picture is shown

Kind = Literal["image", "prompt", "answer", "end"]


@dataclass(frozen=True)
class Token:
    """One token of a conversation, with the piece of text that it encodes."""

    id: int
    text: str
    kind: Kind
    is_supervised: bool = False


@dataclass(frozen=True)
class ExplainedPicture:
    """A picture of the example twice: as it is stored, turned upright, and as the vision tower receives it."""

    name: str
    stored_px: tuple[int, int]  # (width, height) of the file, before any shrinking
    stored: Image.Image  # at most PREVIEW_PX on its longer side
    seen: Image.Image


@dataclass(frozen=True)
class PromptComparison:
    """The prompt of one answer twice: the tokens before it in training, and the prompt that inference would build.

    Inference is chat, captioning and evaluation. Its prompt is None where the question has no words, which it refuses.
    """

    answer: str
    training: list[Token]
    inference: list[Token] | None

    @property
    def differs_at(self) -> int | None:
        """The first position at which the prompts differ; 0 without an inference prompt, None where they are equal."""
        if self.inference is None:
            return 0
        trained_ids, prompt_ids = ([token.id for token in tokens] for tokens in (self.training, self.inference))
        if trained_ids == prompt_ids:
            return None
        pairs = zip(trained_ids, prompt_ids, strict=False)
        differing = (index for index, pair in enumerate(pairs) if pair[0] != pair[1])
        return next(differing, min(len(trained_ids), len(prompt_ids)))


@dataclass(frozen=True)
class Explanation:
    """How a run with these settings would use one example."""

    config: str
    split: str
    example: Example
    also_in: list[str]  # other data files that hold an example with this id
    template: str
    max_length_tokens: int
    tokens: list[Token]
    pictures: list[ExplainedPicture]
    prompts: list[PromptComparison]
    picture_label: str

    @property
    def counts(self) -> dict[str, int]:
        """Number of tokens by kind, in total, and with a label."""
        by_kind = Counter(token.kind for token in self.tokens)
        kinds: tuple[Kind, ...] = ("image", "prompt", "answer", "end")
        num_supervised = sum(token.is_supervised for token in self.tokens)
        return {**{kind: by_kind[kind] for kind in kinds}, "total": len(self.tokens), "supervised": num_supervised}

    @property
    def verdict(self) -> str:
        """One sentence: whether inference builds the prompts of training."""
        wrong, num = sum(prompt.differs_at is not None for prompt in self.prompts), len(self.prompts)
        if not wrong:
            answers = "its answer" if num == 1 else f"its {num} answers"
            return f"equal: chat, captioning and evaluation prompt for {answers} with the tokens of training"
        answers = "its answer" if num == 1 else f"{wrong} of its {num} answers"
        return f"different: {answers} would be prompted for with other tokens than in training"

    @property
    def reasons(self) -> list[str]:
        """Why inference prompts of this example differ from training; empty where none does."""
        reasons = []
        if self.example.messages[0].role == "system":
            reasons.append("it has a system turn, and chat, captioning and evaluation send none")
        users = [message for message in self.example.messages if message.role == "user"]
        if any(_words(message, self.picture_label) is None for message in users):
            reasons.append(
                "its pictures are not where the chat puts them: before the words, each <image> on a line of its own"
            )
        return reasons if any(prompt.differs_at is not None for prompt in self.prompts) else []

    def to_json(self) -> dict[str, Any]:
        """The explanation as JSON values, without pixels."""
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
                    "answer": prompt.answer,
                    "differs_at": prompt.differs_at,
                    "training": [token.id for token in prompt.training],
                    "inference": None if prompt.inference is None else [token.id for token in prompt.inference],
                }
                for prompt in self.prompts
            ],
            "equal": all(prompt.differs_at is None for prompt in self.prompts),
        }


def runs(tokens: Sequence[Token]) -> Iterator[tuple[int, list[Token]]]:
    """Consecutive tokens of one kind, each group with the position of its first token."""
    start = 0
    for index in range(1, len(tokens) + 1):
        if index == len(tokens) or tokens[index].kind != tokens[start].kind:
            yield start, list(tokens[start:index])
            start = index


def explain(config_path: Path, overrides: list[str], *, sample: str | None = None) -> Explanation:
    """Explains the example with the id `sample`, or the first one.

    Raises ConfigError for a stage that makes its own data and for an unknown id, DataError for an example that the run
    would leave out, ImageError for a picture that cannot be read.
    """
    config = load_config(config_path, overrides)
    if not isinstance(config, StageConfig):
        raise ConfigError(f"{config_path} is for {config.stage}, which makes its own data; there is nothing to explain")
    split, example, also_in = _find(config.data, sample)
    setup = load_prompt_setup(config.model)
    renderer = setup.renderer
    if reason := why_left_out(example, renderer, config.data, max_positions=setup.max_positions):
        raise DataError(f"{example.source}: the run would leave out {example.id}: {reason}")
    transform = _transform(config.model, setup.layout)
    rendered = renderer.render_example(example)
    pictures = [
        _picture(image, f"picture {number}", setup.layout, transform)
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
        _prompts(renderer, example, rendered, setup.picture_label),
        setup.picture_label,
    )


def _picture(image: ImageSource, unnamed: str, layout: Layout, transform: Any) -> ExplainedPicture:
    assert not isinstance(image, PreparedImage), "data readers give no prepared pictures"
    picture, size = load_image(image, may_shrink=True), image_size(image)
    seen = preview(layout, transform, PreparedImage(size, layout.prepare(transform, picture, size)))
    return ExplainedPicture(image if isinstance(image, str) else unnamed, size[::-1], shrink(picture, PREVIEW_PX), seen)


def _transform(config: ModelConfig, layout: Layout) -> Any:
    if config.checkpoint:
        return VisionLanguageProcessor.from_pretrained(config.checkpoint).image_processor
    assert config.vision
    return layout.image_processor(load_tower(config.vision).spec, config.vision.image_mode)


def _find(data: DataConfig, sample: str | None) -> tuple[str, Example, list[str]]:
    """(split, example, other files that hold the id), or the first example. Train is searched before val."""
    matches: list[tuple[str, Example]] = []
    bad: list[str] = []
    ids: list[str] = []
    replay = (data.replay,) if data.replay else ()
    for split, sources in (("train", (*data.train, *replay)), ("val", data.val)):
        for source in sources:
            read = read_source(source)
            if sample is None and len(read.examples):
                return split, read.examples[0], []
            source_ids = list(read.examples.ids())
            ids += source_ids
            matches += [(split, read.examples[index]) for index, name in enumerate(source_ids) if name == sample]
            bad += [f"{row.source} row {row.row}: {row.reason}" for row in read.bad if sample in (None, row.id)]
    if matches:
        return *matches[0], [example.source for _, example in matches[1:]]
    if bad:
        shown = f"--sample {sample}" if sample else "every row"
        raise DataError(f"the run would leave out {shown}: {bad[0]}")
    near = ", ".join(_near(sample or "", ids)) or "none"
    raise ConfigError(f"--sample: no example {sample!r} among the {len(ids):,} of train and val; similar ids: {near}")


def _near(sample: str, ids: Sequence[str]) -> list[str]:
    """Up to five ids with the longest common prefix and suffix. (difflib takes too long on a million ids.)"""

    def num_shared(one: str, other: str) -> int:
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))

    def likeness(other: str) -> int:
        return num_shared(sample, other) + num_shared(sample[::-1], other[::-1])

    return [other for other in heapq.nlargest(5, ids, key=likeness) if 2 * likeness(other) >= len(sample)]


def tokenise(rendered: RenderedConversation, image_token_id: int) -> list[Token]:
    """The tokens of a rendered conversation, each with its text, its kind, and whether it has a label."""
    kinds: list[Kind] = ["prompt"] * len(rendered.input_ids)
    for answer in rendered.answers:
        kinds[answer.start : answer.content_end] = ["answer"] * (answer.content_end - answer.start)
        kinds[answer.content_end : answer.end] = ["end"] * (answer.end - answer.content_end)
    labels = [IGNORE_INDEX, *rendered.labels[1:]]  # nothing predicts the first token
    texts = rendered.texts
    for place, text in enumerate(texts[1:], start=1):
        if rendered.input_ids[place] == image_token_id and text != IMAGE_TOKEN:  # white space that no token encodes
            texts[place - 1] += text.removesuffix(IMAGE_TOKEN)
    return [
        Token(token_id, IMAGE_TOKEN, "image")
        if token_id == image_token_id
        else Token(token_id, text, kind, label != IGNORE_INDEX)
        for token_id, text, kind, label in zip(rendered.input_ids, texts, kinds, labels, strict=True)
    ]


def _words(message: Message, label: str) -> str | None:
    """A question without the picture marks before it; None where its pictures are not where the chat puts them."""
    marked = "".join(IMAGE_TOKEN if isinstance(part, ImageRef) else part for part in message.parts)
    marks = picture_marks(marked.count(IMAGE_TOKEN), label)
    return marked.removeprefix(marks) if marked.startswith(marks) else None


def _prompts(
    renderer: Renderer, example: Example, rendered: RenderedConversation, label: str
) -> list[PromptComparison]:
    """Compares, for each answer, the tokens before it in training with the prompt of a chat that reaches this turn."""
    conversation = Conversation(label=label)
    comparisons: list[PromptComparison] = []
    tokens = tokenise(rendered, renderer.image_token_id)
    turns = [message for message in example.messages if message.role != "system"]
    for number, place in zip(range(0, len(turns), 2), rendered.answers, strict=True):
        question, answer = turns[number], turns[number + 1]
        words = _words(question, label)
        text = question.text if words is None else words
        pictures = [example.images[part.index] for part in question.parts if isinstance(part, ImageRef)]
        inference = None
        if text.strip():
            rendered_prompt = renderer.render_example(conversation.ask(text, pictures))
            inference = tokenise(rendered_prompt, renderer.image_token_id)
        comparisons.append(PromptComparison(answer.text, tokens[: place.start], inference))
        conversation.add(text, pictures, answer.text)
    return comparisons
