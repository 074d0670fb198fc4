"""A reply, made of a request's tokens so far, and what the model got of its pictures."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from mmllm.batch import PreparedImage
from mmllm.inference.requests import FinishReason, Request
from mmllm.model.image_tokens import Layout, Native, Tiles

LEGIBLE_PX = 8  # height of a letter that a vision tower can still tell from others
SMALL_TEXT_PX = 16  # height of the small print of a scanned page or a screenshot


@dataclass(frozen=True)
class SeenPicture:
    """One picture of a reply's prompt. Sizes are (height, width) in pixels.

    `warning` says which text is too small after shrinking; empty where even small print stays legible.
    """

    original_size: tuple[int, int]
    seen_size: tuple[int, int]
    num_tokens: int
    warning: str = ""


@dataclass(frozen=True)
class Reply:
    """A reply, or what there is of it so far: then `finish_reason` is None.

    `finish_reason` is `end` where the model ended its answer or wrote a text of `Sampling.stop`, `length` where
    `max_new_tokens` did, `stopped` where the caller did, and `timeout` where `timeout_seconds` did.

    Example:
        import mmllm

        model = mmllm.load("runs/tiny/stage2")
        reply = model.ask("Describe the picture.", ["data/scenes/val/images/000003.png"])
        if reply.finish_reason == "length":
            print("cut off after", reply.num_new_tokens, "tokens")
        for picture in reply.pictures:
            print(picture.original_size, "seen as", picture.seen_size, picture.warning)
    """

    text: str
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_image_tokens: int
    num_new_tokens: int
    seconds: float  # since the call
    pictures: tuple[SeenPicture, ...] = ()  # in the order of the conversation
    seconds_to_first_token: float | None = None
    num_cached_tokens: int = 0  # of the prompt, whose keys and values were known from an earlier one
    logprobs: tuple[float, ...] | None = None  # of the new tokens, where `Sampling.logprobs` asks for them
    others: tuple[Reply, ...] = ()  # where `Sampling.n` asks for several


def make_reply(request: Request, pictures: tuple[SeenPicture, ...], begun: float) -> Reply:
    """The reply so far. `begun` is when the call began, by `time.monotonic`."""
    finish_reason, num_new = request.finish_reason, len(request.new_ids)
    sampling = request.sampler.sampling
    return Reply(
        text=sampling.cut(request.decode(request.answer_ids), is_finished=finish_reason is not None),
        finish_reason=finish_reason,
        num_prompt_tokens=len(request.prompt_ids),
        num_image_tokens=sum(picture.num_tokens for picture in request.pictures),
        num_new_tokens=num_new,
        seconds=time.monotonic() - begun,
        pictures=pictures,
        seconds_to_first_token=None if request.first_token is None else request.first_token - begun,
        num_cached_tokens=request.num_cached_tokens,
        logprobs=tuple(request.logprobs) if sampling.logprobs else None,
    )


def seen_picture(layout: Layout, transform: Any, prepared: PreparedImage, num_tokens: int) -> SeenPicture:
    """What the model gets of a prepared picture."""
    seen_size, scale = _seen(layout, transform, prepared)
    warning = ""
    if SMALL_TEXT_PX / scale < LEGIBLE_PX:
        warning = (
            f"shrunk to {seen_size[1]} x {seen_size[0]} pixels: letters lower than {math.ceil(LEGIBLE_PX * scale)} "
            "pixels of the original cannot be read; crop to what matters"
        )
    return SeenPicture(prepared.size, seen_size, num_tokens, warning)


def _seen(layout: Layout, transform: Any, prepared: PreparedImage) -> tuple[tuple[int, int], float]:
    """(size seen, how many original pixels are one seen pixel)."""
    height, width = prepared.size
    if isinstance(layout, Native):
        rows, columns = prepared.inputs["image_sizes"][0].tolist()
        size = (rows * layout.unit_px, columns * layout.unit_px)
        return size, max(height / size[0], width / size[1])
    if isinstance(layout, Tiles):
        rows, columns = layout.grid(prepared.size)
        side = layout.view_size_px
        scale = max(height / (rows * side), width / (columns * side))  # the tiles keep the aspect ratio
        return (round(height / scale), round(width / scale)), scale
    size = (int(prepared.inputs["pixel_values"].shape[-2]), int(prepared.inputs["pixel_values"].shape[-1]))
    scales = (height / size[0], width / size[1])
    return size, min(scales) if getattr(transform, "do_center_crop", False) else max(scales)
