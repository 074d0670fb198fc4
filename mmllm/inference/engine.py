"""Puts a checkpoint to work: replies to conversations from any number of threads, batched as they come.

A conversation becomes a request: its pictures are prepared and its tokens rendered in the caller's thread. The
scheduler runs the model. See `Engine.describe_batching` for what it does with one LLM.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import Tensor

from mmllm.batch import Example, ImageSource, Message, PreparedImage
from mmllm.chat.conversation import Conversation
from mmllm.chat.renderer import RenderedConversation
from mmllm.checkpoint.folder import load_checkpoint, stored_dtypes
from mmllm.checkpoint.generation_settings import end_token_ids
from mmllm.checkpoint.golden import require_golden
from mmllm.errors import MmllmError
from mmllm.images import image_size, load_image
from mmllm.inference.decoders import GenerateDecoder, RowDecoder
from mmllm.inference.joining import Joining, probe_joining
from mmllm.inference.kv_cache import pad_prompts
from mmllm.inference.picture_features import Picture, PictureFeatures, count_tokens, picture_key, transform_key
from mmllm.inference.placement import answer_dtypes, find_device, free_bytes, spread_model
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.preview import preview, shrink
from mmllm.inference.replies import Reply, SeenPicture, make_reply, seen_picture
from mmllm.inference.requests import Request
from mmllm.inference.sampling import GREEDY, Sampling, TokenSampler
from mmllm.inference.scheduler import Batching, CallerScheduler, Scheduler
from mmllm.inference.structured import Grammars
from mmllm.model.positions import max_length_tokens
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel

__all__ = ["Engine", "Reply"]

logger = logging.getLogger(__name__)
NUM_READERS = 4  # threads that decode and transform the pictures of one call
MAX_ROWS = 64
MAX_WAITING = 1024
FEATURE_CACHE_BYTES = 256 * 2**20
MAX_PREFIX_CACHE_BYTES = 2**30  # at most a quarter of `cache_bytes`


class Engine:
    """A model, its processor and its renderer. Safe to call from several threads, whose requests share batches.

    `mmllm.load` makes one. `ask` answers one question, `reply` and `reply_batch` answer conversations, `stream` yields
    the answer as it is written. A reply does not depend on what shares its batch.

    Args:
        batching: `continuous`: requests enter and leave at every token; `dynamic`: those that wait become a batch when
            the one before has been answered; `static`: each call is a batch, run in the caller's thread.
        max_rows: requests that run at once.
        cache_bytes: memory for keys and values of the running requests; default: half of a GPU's free memory, or a
            quarter of the machine's.
        feature_cache_bytes: memory for the image tokens of pictures that may be asked about again; 0: none are kept.
        prefix_cache_bytes: the same for keys and values of prompts; default: a quarter of `cache_bytes`, up to 1 GiB.
        max_waiting: requests that wait for a place; further callers wait before they may queue.

    Example:
        import mmllm

        model = mmllm.load("runs/tiny/stage2")
        talk = mmllm.Conversation(label=model.picture_label)
        question = talk.ask("Describe the picture.", ["data/scenes/val/images/000003.png"])
        for reply in model.stream(question, mmllm.Sampling(max_new_tokens=16)):
            print(reply.text)
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: VisionLanguageProcessor,
        *,
        name: str,
        batching: Batching = "continuous",
        max_rows: int = MAX_ROWS,
        cache_bytes: int | None = None,
        feature_cache_bytes: int = FEATURE_CACHE_BYTES,
        prefix_cache_bytes: int | None = None,
        max_waiting: int = MAX_WAITING,
    ):
        if batching not in (known := get_args(Batching)):
            raise MmllmError(f"batching must be one of {', '.join(known)}, got {batching!r}")
        if max_rows < 1 or max_waiting < 1:
            raise MmllmError(f"max_rows and max_waiting must be at least 1, got {max_rows} and {max_waiting}")
        self.model, self.processor, self.name = model, processor, name
        self.renderer = processor.build_renderer()
        self.max_length_tokens = max_length_tokens(model)  # of prompt and answer together
        self.end_token_ids = end_token_ids(model, self.renderer)
        self.batching, self.max_rows, self.max_waiting = batching, max_rows, max_waiting
        self._cache_bytes, self._prefix_cache_bytes = cache_bytes, prefix_cache_bytes
        self._feature_cache_bytes = feature_cache_bytes
        self._transform_key = transform_key(processor)
        self._grammars = Grammars(processor.tokenizer, self.end_token_ids, model.config.text_config.vocab_size)
        self._starting = threading.Lock()

    @staticmethod
    def load(
        path: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        verify: bool = True,
        batching: Batching = "continuous",
        max_rows: int = MAX_ROWS,
        cache_bytes: int | None = None,
    ) -> Engine:
        """The engine of a checkpoint. Raises CheckpointError, MmllmError.

        `device` is one device, or `auto`: all of this machine's, for a model that is too large for one. `dtype` is
        `fp32`, `bf16` or `fp16` for all parts, or `stored`: each in its own; default: see `answer_dtype`.
        With `verify` one that does not give its golden answers is refused. For the small model that takes 0.03 s,
        where the files take 0.08 s and the first import of the libraries a second; see CHEAP_PARAMETERS for large ones.
        The other arguments are those of the class.
        """
        place = None if device == "auto" else find_device(device)
        dtypes = answer_dtypes(stored_dtypes(path), place, dtype)
        model, processor, _ = load_checkpoint(path, dtype=dtypes)
        model = spread_model(model) if place is None else model.to(place)
        if verify:
            require_golden(model, processor, path)
        name = Path(path).resolve().name
        return Engine(model, processor, name=name, batching=batching, max_rows=max_rows, cache_bytes=cache_bytes)

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
        ids, mask = pad_prompts([one.input_ids for one in rendered], int(self.processor.tokenizer.pad_token_id))
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if images:
            inputs |= {name: value.to(device) for name, value in self.processor.load_pixels(images).items()}
        return inputs

    def seen(self, image: ImageSource | Path) -> SeenPicture:
        """What the model gets of a picture: size after the transform, tokens, what is lost. Raises ImageError."""
        prepared = self.prepare(image)
        return self._seen(prepared, count_tokens(self.model.layout, prepared))

    def _seen(self, prepared: PreparedImage, num_tokens: int) -> SeenPicture:
        return seen_picture(self.model.layout, self.processor.image_processor, prepared, num_tokens)

    @functools.cached_property
    def _joining(self) -> Joining:
        return probe_joining(self.model)

    @functools.cached_property
    def cache_bytes(self) -> int:
        """Memory for keys and values of the running requests."""
        return free_bytes(self.model.device) if self._cache_bytes is None else self._cache_bytes

    @property
    def max_cells(self) -> int | None:
        """Tokens of all running rows, padding included, that fit in `cache_bytes`; None where their size is unknown."""
        size = self._joining.bytes_per_token
        return self.cache_bytes // size if size else None

    def describe_batching(self) -> str:
        """How requests share the model, and how many fit; for people."""
        if self.batching == "static":
            return "static batching: each call is a batch"
        if self._joining.refusal:
            return f"dynamic batching of up to {self.max_rows} requests: {self._joining.refusal}"
        return (
            f"{self.batching} batching of up to {self.max_rows} requests; {self.cache_bytes / 2**20:,.0f} MiB for keys "
            f"and values hold {self.max_cells:,} tokens of {self._joining.bytes_per_token:,} bytes"
        )

    @functools.cached_property
    def scheduler(self) -> Scheduler | CallerScheduler:
        """What runs the model. It is made with the first request, since that probes the LLM."""
        pad = int(self.processor.tokenizer.pad_token_id)
        whole_batches = GenerateDecoder(self.model, pad, self.max_length_tokens)
        if self.batching == "static":
            return CallerScheduler(whole_batches)
        if self._joining.refusal:
            logger.info("%s: %s", self.name, self.describe_batching())
            return Scheduler(
                whole_batches, "dynamic", max_rows=self.max_rows, max_cells=None, max_waiting=self.max_waiting
            )
        prefix_bytes = self._prefix_cache_bytes
        if prefix_bytes is None:
            prefix_bytes = min(MAX_PREFIX_CACHE_BYTES, self.cache_bytes // 4)
        features = PictureFeatures(self.model, max_bytes=self._feature_cache_bytes)
        rows = RowDecoder(self.model, features, PrefixCache(max_bytes=prefix_bytes), pad)
        return Scheduler(
            rows, self.batching, max_rows=self.max_rows, max_cells=self.max_cells, max_waiting=self.max_waiting
        )

    @property
    def num_running(self) -> int:
        """Requests that are being answered now."""
        return len(self.scheduler.decoder.requests) if "scheduler" in self.__dict__ else 0

    def start(self) -> None:
        """Probes the LLM and makes the scheduler now, and not with the first request."""
        with self._starting, torch.inference_mode():
            _ = self.scheduler

    def _render(self, example: Example, prefix: str) -> tuple[list[int], int]:
        """(token ids of the prompt, how many of the last ones begin the answer)."""
        if not example.messages or example.messages[-1].role != "user":
            raise MmllmError("the last message must be the user's: there is nothing to answer")
        rendered = self.renderer.render_example(example)
        ids, num_forced = rendered.input_ids, 0
        if prefix:
            begun = self.renderer.render_example(
                replace(example, messages=(*example.messages, Message("assistant", (prefix,))))
            )
            ids = begun.input_ids[: begun.answers[-1].content_end]
            num_forced = len(ids) - begun.answers[-1].start
        if self.max_length_tokens - len(ids) < 1:
            raise MmllmError(
                f"the conversation is {len(ids)} tokens long ({rendered.num_image_tokens} of them for pictures) but "
                f"this model takes {self.max_length_tokens}; begin a new one"
            )
        return ids, num_forced

    def read_pictures(self, examples: Sequence[Example]) -> list[tuple[Picture, ...]]:
        """The prepared pictures of each example; several are read at once."""
        images = [image for example in examples for image in example.images]
        if len(images) > 1:
            with ThreadPoolExecutor(min(NUM_READERS, len(images)), thread_name_prefix="read") as readers:
                pictures = iter(list(readers.map(self._picture, images)))
        else:
            pictures = iter([self._picture(image) for image in images])
        return [tuple(next(pictures) for _ in example.images) for example in examples]

    def _picture(self, image: ImageSource) -> Picture:
        prepared = self.prepare(image)
        return Picture(prepared, picture_key(prepared, self._transform_key), count_tokens(self.model.layout, prepared))

    def make_requests(
        self, example: Example, pictures: tuple[Picture, ...], sampling: Sampling, **options: Any
    ) -> list[Request]:
        """One request for each of `sampling.n` replies; `options` are further fields of Request."""
        ids, num_forced = self._render(example, sampling.prefix)
        forced = ids[len(ids) - num_forced :]
        return [
            Request(
                ids,
                pictures,
                TokenSampler(
                    sampling,
                    number=number,
                    decode=self.renderer.decode,
                    grammar=self._grammars.build(sampling, forced),
                ),
                min(sampling.max_new_tokens, self.max_length_tokens - len(ids)),
                frozenset(self.end_token_ids),
                self.renderer.decode,
                num_forced,
                **options,
            )
            for number in range(sampling.n)
        ]

    def stream(
        self,
        example: Example,
        sampling: Sampling = GREEDY,
        *,
        stop: threading.Event | None = None,
        timeout_seconds: float | None = None,
        priority: int = 0,
    ) -> Iterator[Reply]:
        """The reply as it is written; the last one has a `finish_reason`. Setting `stop` ends it at the next token.

        So does closing the iterator, or `timeout_seconds`. A request of a higher `priority` enters first. Raises
        MmllmError for a conversation that does not fit, ImageError for a picture that cannot be read.
        """
        if sampling.n != 1:
            raise MmllmError(f"a stream is of one reply, and n is {sampling.n}; take reply, or n=1")
        begun = time.monotonic()
        pictures = self.read_pictures([example])[0]
        deadline = None if timeout_seconds is None else begun + timeout_seconds
        (request,) = self.make_requests(example, pictures, sampling, stop=stop, deadline=deadline, priority=priority)
        seen, num_seen = tuple(self._seen(one.prepared, one.num_tokens) for one in pictures), 0
        self.start()
        try:
            self.scheduler.submit(request)
            while not request.is_finished:
                request.wait_for_token(num_seen)
                if len(request.new_ids) > num_seen and not request.is_finished:
                    num_seen = len(request.new_ids)
                    yield make_reply(request, seen, begun)
            request.raise_error()
            yield make_reply(request, seen, begun)
        finally:
            request.cancel()

    def ask(self, question: str, pictures: Sequence[ImageSource | Path] = (), sampling: Sampling = GREEDY) -> Reply:
        """The reply to one question about pictures: paths, the bytes of files, or Pillow's images.

        Raises MmllmError for a question without words, ImageError for a picture that cannot be read.
        """
        images = [str(picture) if isinstance(picture, Path) else picture for picture in pictures]
        return self.reply(Conversation(label=self.picture_label).ask(question, images), sampling)

    def reply(self, example: Example, sampling: Sampling = GREEDY) -> Reply:
        """The whole reply to one conversation."""
        return self.reply_batch([example], sampling)[0]

    def reply_batch(
        self,
        examples: Sequence[Example],
        sampling: Sampling = GREEDY,
        *,
        timeout_seconds: float | None = None,
        priority: int = 0,
    ) -> list[Reply]:
        """Replies to several conversations, the same as one by one. `timeout_seconds` and `priority` as in `stream`."""
        if not examples:
            return []
        begun = time.monotonic()
        deadline = None if timeout_seconds is None else begun + timeout_seconds
        pictures = self.read_pictures(examples)
        groups = [
            self.make_requests(example, taken, sampling, deadline=deadline, priority=priority)
            for example, taken in zip(examples, pictures, strict=True)
        ]
        self.start()
        self.scheduler.run([request for group in groups for request in group])
        replies = []
        for group, taken in zip(groups, pictures, strict=True):
            seen = tuple(self._seen(one.prepared, one.num_tokens) for one in taken)
            first, *others = (make_reply(request, seen, begun) for request in group)
            replies.append(replace(first, others=tuple(others)))
        return replies
