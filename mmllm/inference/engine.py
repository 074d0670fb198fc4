"""Puts a checkpoint to work: replies to conversations, one by one as a stream or many at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mmllm.batch import Example, ImageSource, PreparedImage
from mmllm.chat.conversation import Conversation
from mmllm.chat.renderer import RenderedConversation
from mmllm.checkpoint.folder import load_checkpoint, stored_dtypes
from mmllm.checkpoint.generation_settings import end_token_ids
from mmllm.checkpoint.golden import require_golden
from mmllm.errors import MmllmError
from mmllm.images import image_size, load_image
from mmllm.inference.placement import answer_dtypes, find_device, spread_model
from mmllm.inference.preview import preview, shrink
from mmllm.inference.sampling import GREEDY, Sampling, TokenSampler
from mmllm.model.positions import max_length_tokens
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Reply:
    """A reply, or what there is of it so far: then `finish_reason` is None.

    `finish_reason` is `end` where the model ended its answer, `length` where `max_new_tokens` did, and `stopped` where
    the caller did.

    Example:
        import mmllm

        model = mmllm.load("runs/tiny/stage2")
        reply = model.ask("Describe the picture.", ["data/scenes/val/images/000003.png"])
        if reply.finish_reason == "length":
            print("cut off after", reply.num_new_tokens, "tokens")
    """

    text: str
    finish_reason: Literal["end", "length", "stopped"] | None
    num_prompt_tokens: int
    num_image_tokens: int
    num_new_tokens: int
    seconds: float  # since the call


class _Streamer:
    """transformers' streamer interface: takes the ids as they come."""

    def __init__(self, put: Any):
        self._put = put
        self._is_prompt = True

    def put(self, ids: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._put(ids.flatten().tolist())

    def end(self) -> None:
        """Nothing is held back."""


class Engine:
    """A model, its processor and its renderer. One generation at a time; safe to call from several threads.

    `mmllm.load` makes one. `ask` answers one question, `reply` and `reply_batch` answer conversations, `stream` yields
    the answer as it is written.

    Example:
        import mmllm

        model = mmllm.load("runs/tiny/stage2")
        talk = mmllm.Conversation(label=model.picture_label)
        question = talk.ask("Describe the picture.", ["data/scenes/val/images/000003.png"])
        for reply in model.stream(question, mmllm.Sampling(max_new_tokens=16)):
            print(reply.text)
    """

    def __init__(self, model: VisionLanguageModel, processor: VisionLanguageProcessor, *, name: str):
        self.model, self.processor, self.name = model, processor, name
        self.renderer = processor.build_renderer()
        self.max_length_tokens = max_length_tokens(model)  # of prompt and answer together
        self.end_token_ids = end_token_ids(model, self.renderer)
        self._lock = threading.Lock()

    @staticmethod
    def load(
        path: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        verify: bool = True,
    ) -> Engine:
        """The engine of a checkpoint. Raises CheckpointError, MmllmError.

        `device` is one device, or `auto`: all of this machine's, for a model that is too large for one. `dtype` is
        `fp32`, `bf16` or `fp16` for all parts, or `stored`: each in its own; default: see `answer_dtype`.
        With `verify` one that does not give its golden answers is refused. For the small model that takes 0.03 s,
        where the files take 0.08 s and the first import of the libraries a second; see CHEAP_PARAMETERS for large ones.
        """
        place = None if device == "auto" else find_device(device)
        dtypes = answer_dtypes(stored_dtypes(path), place, dtype)
        model, processor, _ = load_checkpoint(path, dtype=dtypes)
        model = spread_model(model) if place is None else model.to(place)
        if verify:
            require_golden(model, processor, path)
        return Engine(model, processor, name=Path(path).resolve().name)

    @property
    def picture_label(self) -> str:
        """What stands before each of several pictures of a question; `{}` is its number."""
        return self.processor.picture_label

    def prepare(self, image: ImageSource | Path) -> PreparedImage:
        """A picture as this model takes it, to be asked about any number of times. Raises ImageError."""
        return self.processor.load_prepared(image)

    def prepare_shown(self, image: str | Path, longest_px: int) -> tuple[PreparedImage, Image.Image]:
        """A picture as this model takes it, and one for people, with no longer side than this; decoded once."""
        picture = load_image(image, may_shrink=True)
        return self.processor.prepare(picture, image_size(image)), shrink(picture, longest_px)

    def preview(self, image: ImageSource | Path) -> Image.Image:
        """The picture as the vision tower sees it: resized, cropped or padded, values back in 0-255."""
        return preview(self.processor.image_layout, self.processor.image_processor, self.prepare(image))

    def inputs(self, rendered: Sequence[RenderedConversation], images: Sequence[ImageSource]) -> dict[str, Tensor]:
        """Prompts padded on the left, whatever the tokenizer says, and their pictures one behind the other."""
        device = self.model.device
        longest = max(len(one.input_ids) for one in rendered)
        ids = torch.full((len(rendered), longest), int(self.processor.tokenizer.pad_token_id))
        mask = torch.zeros_like(ids)
        for row, one in enumerate(rendered):
            ids[row, longest - len(one.input_ids) :] = torch.tensor(one.input_ids)
            mask[row, longest - len(one.input_ids) :] = 1
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if images:
            inputs |= {name: value.to(device) for name, value in self.processor.load_pixels(images).items()}
        return inputs

    def _render(self, example: Example) -> RenderedConversation:
        if not example.messages or example.messages[-1].role != "user":
            raise MmllmError("the last message must be the user's: there is nothing to answer")
        rendered = self.renderer.render_example(example)
        room = self.max_length_tokens - len(rendered.input_ids)
        if room < 1:
            raise MmllmError(
                f"the conversation is {len(rendered.input_ids)} tokens long ({rendered.num_image_tokens} of them for "
                f"pictures) but this model takes {self.max_length_tokens}; begin a new one"
            )
        return rendered

    def _generate(self, inputs: dict[str, Tensor], sampling: Sampling, **kwargs: Any) -> Tensor:
        room = self.max_length_tokens - inputs["input_ids"].shape[1]
        with torch.inference_mode():
            generated: Tensor = self.model.generate(
                **inputs,
                **kwargs,
                do_sample=False,
                logits_processor=[TokenSampler(sampling)] if sampling.temperature > 0 else [],
                max_new_tokens=min(sampling.max_new_tokens, room),
                eos_token_id=self.end_token_ids,
                pad_token_id=int(self.processor.tokenizer.pad_token_id),
            )
        return generated[:, inputs["input_ids"].shape[1] :]

    def stream(
        self, example: Example, sampling: Sampling = GREEDY, *, stop: threading.Event | None = None
    ) -> Iterator[Reply]:
        """The reply as it is written; the last one has a `finish_reason`. Setting `stop` ends it at the next token.

        Raises MmllmError for a conversation that does not fit, ImageError for a picture that cannot be read.
        """
        begun = time.monotonic()
        rendered = self._render(example)
        inputs = self.inputs([rendered], example.images)
        abandoned = threading.Event()  # the caller stopped listening, as a closed tab does
        queue: SimpleQueue[list[int] | None] = SimpleQueue()

        def is_stopped(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            halted = abandoned.is_set() or (stop is not None and stop.is_set())
            return torch.full((ids.shape[0],), halted, dtype=torch.bool, device=ids.device)

        def work() -> None:
            try:
                with self._lock:
                    if not abandoned.is_set() and not (stop is not None and stop.is_set()):
                        self._generate(inputs, sampling, streamer=_Streamer(queue.put), stopping_criteria=[is_stopped])
            finally:
                queue.put(None)

        def reply(ids: list[int], finish: Literal["end", "length", "stopped"] | None) -> Reply:
            text = self.renderer.decode(ids)
            return Reply(
                text, finish, len(rendered.input_ids), rendered.num_image_tokens, len(ids), time.monotonic() - begun
            )

        executor = ThreadPoolExecutor(1, thread_name_prefix="generate")
        generation = executor.submit(work)
        ids: list[int] = []
        try:
            while (new := queue.get()) is not None:
                ids += new
                yield reply(ids, None)
            generation.result()  # raises what the generation raised
            yield reply(ids, self._finish(ids, stop))
        finally:
            abandoned.set()
            executor.shutdown()

    def _finish(self, ids: Sequence[int], stop: threading.Event | None) -> Literal["end", "length", "stopped"]:
        if ids and ids[-1] in self.end_token_ids:
            return "end"
        return "stopped" if stop is not None and stop.is_set() else "length"

    def ask(self, question: str, pictures: Sequence[ImageSource | Path] = (), sampling: Sampling = GREEDY) -> Reply:
        """The reply to one question about pictures: paths, the bytes of files, or Pillow's images.

        Raises MmllmError for a question without words, ImageError for a picture that cannot be read.
        """
        images = [str(picture) if isinstance(picture, Path) else picture for picture in pictures]
        return self.reply(Conversation(label=self.picture_label).ask(question, images), sampling)

    def reply(self, example: Example, sampling: Sampling = GREEDY) -> Reply:
        """The whole reply to one conversation."""
        return self.reply_batch([example], sampling)[0]

    def reply_batch(self, examples: Sequence[Example], sampling: Sampling = GREEDY) -> list[Reply]:
        """Replies to several conversations in one batch, the same as one by one."""
        if not examples:
            return []
        begun = time.monotonic()
        rendered = [self._render(example) for example in examples]
        inputs = self.inputs(rendered, [image for example in examples for image in example.images])
        with self._lock:
            generated = self._generate(inputs, sampling).tolist()
        replies = []
        for one, row in zip(rendered, generated, strict=True):
            end = next((place for place, token in enumerate(row) if token in self.end_token_ids), len(row))
            ids = row[: end + 1]
            replies.append(
                Reply(
                    self.renderer.decode(ids),
                    self._finish(ids, None),
                    len(one.input_ids),
                    one.num_image_tokens,
                    len(ids),
                    time.monotonic() - begun,
                )
            )
        return replies
