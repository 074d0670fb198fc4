"""Golden answers: what a model said when it was saved, kept in its checkpoint, so that any drift is seen.

`golden.json` and a few small drawn pictures in `golden/` are beside the manifest, which has their checksums. They are
drawn and not taken from a run's data: so they fit every model, and publish nobody's picture with a checkpoint.
Three things are checked separately: the prompts (tokenizer, chat template), the pictures as the tower receives them
(image transform), and the answers (weights, code, precision), by one teacher-forced forward pass for each.

Tolerances are measured, see bench/RESULTS.md: several times what other threads, attention, batching and hardware did
to an unchanged model, and a small part of what a changed model shows.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from mmllm.batch import Example, ImageRef
from mmllm.chat.conversation import Conversation
from mmllm.chat.renderer import ChatError
from mmllm.checkpoint.folder import CheckpointError, load_checkpoint
from mmllm.images import ImageError
from mmllm.model.positions import max_length_tokens
from mmllm.model.probing import rounding_error
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel

GOLDEN = "golden.json"
NUM_TOKENS = 16  # of an answer
NUM_VALUES = 256  # of a picture's pixel values are kept
PIXEL_TOLERANCE = 0.03  # of one normalised value: two to four grey levels
PIXEL_MEAN_TOLERANCE = 0.002  # of their mean, which rounding does not move
# In nats, by precision: (how far a token's log-probability may move, and be below the most likely token's; how far that
# of the second choice may move). The second choice shows most: an answer given with certainty hardly moves, whatever
# happens to the weights. Quantisation moves the second choice as far as damage would.
TOLERANCES: dict[str, tuple[float, float]] = {
    "float32": (0.001, 0.001),
    "float16": (0.1, 0.3),
    "bfloat16": (0.5, 1.0),
    "quantised": (1.0, math.inf),
}
# Loading checks the answers of models up to this size, on a GPU of all models. A 7B model needs a minute of a CPU for
# the three answers, more than for loading; there only `mmllm doctor` checks them. Prompts and pictures always are.
CHEAP_PARAMETERS = 500_000_000
TIMES_ROUNDING = 2  # some models move by more than TOLERANCES; allowed is this multiple of `Golden.rounding`
NUM_PICTURES = 2
# name, question, indices of its pictures
PROMPTS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("one picture", "describe the picture.", (0,)),
    ("two pictures", "which picture has a star?", (0, 1)),
    ("text only", "how many sides does a triangle have?", ()),
)

Part = Literal["prompts", "pictures", "answers"]


@dataclass(frozen=True)
class Check:
    """The result of one of the three comparisons, in a sentence with numbers."""

    part: Part
    holds: bool
    text: str


@dataclass(frozen=True)
class GoldenPicture:
    """A picture file, and evenly spaced values of the pixels that the image transform makes of it."""

    file: str
    shape: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class GoldenAnswer:
    """A question, its exact prompt, and the model's greedy answer."""

    name: str
    question: str
    pictures: tuple[int, ...]
    prompt: str | None  # as the saved chat template renders it elsewhere; None where it takes no pictures
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...] = ()  # of each token of the answer, given the tokens before it
    second_ids: tuple[int, ...] = ()  # the second choice at each token
    second_logprobs: tuple[float, ...] = ()

    def example(self, folder: Path, files: Sequence[str], label: str) -> Example:
        return Conversation(label=label).ask(self.question, [str(folder / files[index]) for index in self.pictures])


@dataclass(frozen=True)
class Golden:
    """What `golden.json` holds."""

    vocabulary: str  # a hash over every token and its id
    precision: str  # a key of TOLERANCES: the precision in which the answers were given
    pictures: tuple[GoldenPicture, ...]
    answers: tuple[GoldenAnswer, ...]
    rounding: float = 0.0  # nats by which rounding moved the answers, where they were given in 16 bits


def draw_golden_picture(index: int) -> Image.Image:
    """Shapes on a gradient; not square, so that cropping, padding and stretching differ; the same on every machine."""
    picture = Image.linear_gradient("L").resize((96 + 16 * index, 80)).convert("RGB")
    canvas = ImageDraw.Draw(picture)
    if index == 0:
        canvas.ellipse((24, 16, 72, 64), fill=(214, 39, 40))
    else:
        canvas.polygon([(14, 40), (34, 10), (54, 40), (34, 30)], fill=(31, 71, 180))
        canvas.rectangle((76, 48, 100, 72), fill=(240, 200, 40))
    return picture


def _vocabulary_hash(tokenizer: Any) -> str:
    entries = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _chat_text(processor: VisionLanguageProcessor, example: Example) -> str | None:
    from jinja2 import TemplateError

    parts = [
        {"type": "image"} if isinstance(part, ImageRef) else {"type": "text", "text": part}
        for part in example.messages[-1].parts
    ]
    try:
        text: str = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError):  # a template for text alone
        return None
    return text


def _values(pixels: Tensor) -> Tensor:
    return pixels.flatten().double()[torch.linspace(0, pixels.numel() - 1, NUM_VALUES).long()]


@torch.inference_mode()
def answer_logits(
    model: VisionLanguageModel, prompt_ids: Sequence[int], token_ids: Sequence[int], pictures: Mapping[str, Tensor]
) -> Tensor:
    """The logits from which each token of an answer is chosen, [T, V] in float32, by one forward pass."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt_ids, *token_ids[:-1]]], device=device)
    tensors = {name: value.to(device) for name, value in pictures.items()}
    tensors["attention_mask"] = torch.ones_like(ids)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(token_ids), **tensors).logits[0].float()
    logits[:, model.config.image_token_id] = -math.inf  # as the engine does: an answer never holds an image token
    return logits


@torch.inference_mode()
def _greedy(
    model: VisionLanguageModel, prompt_ids: Sequence[int], pictures: Mapping[str, Tensor], end: int
) -> list[int]:
    """Greedy decoding without a KV cache: each token as the checks compute it, on any LLM."""
    seen, ids = dict(pictures), list[int]()
    if pictures:  # the tower runs once, not for each token
        pixels = seen.pop("pixel_values").to(model.get_input_embeddings().weight.device)
        seen["image_features"] = model.encode_images(pixels, pictures.get("image_sizes"))
    while len(ids) < NUM_TOKENS and end not in ids:
        ids.append(int(answer_logits(model, prompt_ids, [*ids, end], seen)[-1].argmax()))
    return ids


def _logprobs(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Log-probabilities of these tokens, [T]."""
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0]


def make_golden(model: VisionLanguageModel, processor: VisionLanguageProcessor) -> dict[str, bytes]:
    """The files to save in the checkpoint, by their paths inside it, from the answers of the model in memory.

    A prompt is left out where the template renders it empty or where it exceeds the LLM's context length.
    """
    assert not model.training, "in training mode, dropout and batch norms change every answer"
    drawn = [draw_golden_picture(index) for index in range(NUM_PICTURES)]
    renderer = processor.build_renderer()
    answers = []
    for name, question, indices in PROMPTS:
        example = Conversation(label=processor.picture_label).ask(question, [drawn[index] for index in indices])
        prompt_ids = tuple(renderer.render_example(example).input_ids)
        if not 0 < len(prompt_ids) <= max_length_tokens(model) - NUM_TOKENS:
            continue
        tensors = processor.load_pixels(example.images) if indices else {}
        ids = _greedy(model, prompt_ids, tensors, renderer.end_token_id)
        prompt = _chat_text(processor, example)
        answers.append(GoldenAnswer(name, question, indices, prompt, prompt_ids, tuple(ids), renderer.decode(ids)))
    files, pictures = {}, []
    for index, picture in enumerate(drawn):
        file = io.BytesIO()
        picture.save(file, "png")
        files[name := f"golden/picture_{index + 1}.png"] = file.getvalue()
        pixels = processor.load_pixels([picture])["pixel_values"]
        pictures.append(GoldenPicture(name, tuple(pixels.shape), tuple(round(float(v), 4) for v in _values(pixels))))
    golden = Golden(_vocabulary_hash(processor.tokenizer), precision_of(model), tuple(pictures), tuple(answers))
    golden = replace(golden, rounding=_rounding(model, processor, golden, drawn))
    return with_logits(golden, files, all_logits(model, processor, golden, drawn))


def _rounding(model: VisionLanguageModel, processor: VisionLanguageProcessor, golden: Golden, pictures: Any) -> float:
    """How far in nats 16 bits move a small model's answers from fp32; 0.25 for SmolLM2 in bf16, 0 for large ones."""

    def logprobs() -> list[Tensor]:
        logits = all_logits(model, processor, golden, pictures)
        return [_logprobs(row, answer.token_ids) for row, answer in zip(logits, golden.answers, strict=True)]

    return rounding_error(model, logprobs) if _is_cheap(model) else 0.0


def _is_cheap(model: VisionLanguageModel) -> bool:
    return int(sum(parameter.numel() for parameter in model.parameters())) <= CHEAP_PARAMETERS


def all_logits(
    model: VisionLanguageModel, processor: VisionLanguageProcessor, golden: Golden, pictures: Sequence[Any]
) -> list[Tensor]:
    """`answer_logits` of every golden answer; `pictures` are the golden pictures or their paths."""
    logits = []
    for answer in golden.answers:
        tensors = processor.load_pixels([pictures[index] for index in answer.pictures]) if answer.pictures else {}
        logits.append(answer_logits(model, answer.prompt_ids, answer.token_ids, tensors))
    return logits


def with_logits(golden: Golden, pictures: Mapping[str, bytes], logits: Sequence[Tensor]) -> dict[str, bytes]:
    """The golden files of a model that gives the same answers with these logits."""
    answers = []
    for answer, values in zip(golden.answers, logits, strict=True):
        others = values.scatter(1, torch.tensor(answer.token_ids, device=values.device)[:, None], -math.inf)
        second_ids = tuple(others.argmax(-1).tolist())
        logprobs, second_logprobs = (
            tuple(round(value, 5) for value in _logprobs(values, ids).tolist())
            for ids in (answer.token_ids, second_ids)
        )
        answers.append(replace(answer, logprobs=logprobs, second_ids=second_ids, second_logprobs=second_logprobs))
    text = json.dumps(asdict(replace(golden, answers=tuple(answers))))
    return {GOLDEN: f"{text}\n".encode(), **pictures}


def read_golden(folder: str | Path) -> Golden | None:
    """The golden answers of a checkpoint; None where it was saved without them. Raises CheckpointError."""
    path = Path(folder) / GOLDEN
    if not path.is_file():
        return None
    try:
        return TypeAdapter(Golden).validate_json(path.read_bytes())
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(
            f"{path} is damaged at {place or 'its beginning'}: {error.errors()[0]['msg']}; copy the folder again"
        ) from error


def verify_golden(
    model: VisionLanguageModel, processor: VisionLanguageProcessor, folder: str | Path, *, answers: bool = True
) -> list[Check]:
    """Checks that a loaded model is still the one saved in `folder`; no checks where it has no golden answers.

    Works in any precision, on any device. Without `answers` the model is not run. Raises CheckpointError.
    """
    folder = Path(folder)
    golden = read_golden(folder)
    if golden is None:
        return []
    checks = [_check_prompts(processor, golden, folder), _check_pictures(processor, golden, folder)]
    return [*checks, _check_answers(model, processor, golden, folder)] if answers else checks


def _check_prompts(processor: VisionLanguageProcessor, golden: Golden, folder: Path) -> Check:
    wrong = []
    try:
        renderer = processor.build_renderer()
    except ChatError as error:
        return Check("prompts", False, f"the chat template cannot be rendered any more: {error}")
    if _vocabulary_hash(processor.tokenizer) != golden.vocabulary:
        wrong.append("the tokenizer has other tokens, or other ids for them")
    for answer in golden.answers:
        example = answer.example(folder, [picture.file for picture in golden.pictures], processor.picture_label)
        ids = renderer.render_example(example).input_ids
        if tuple(ids) != answer.prompt_ids:
            first = next((i for i, (a, b) in enumerate(zip(ids, answer.prompt_ids, strict=False)) if a != b), len(ids))
            was = f"{len(answer.prompt_ids)} when saved"
            wrong.append(f"{answer.name}: {len(ids)} tokens, {was}; other from position {first} on")
        elif answer.prompt is not None and (text := _chat_text(processor, example)) != answer.prompt:
            wrong.append(f"{answer.name}: chat_template.jinja renders {text!r} and not {answer.prompt!r}")
    if wrong:
        meaning = "the model would get other prompts than in training: tokenizer or chat template changed"
        return Check("prompts", False, f"{'; '.join(wrong)}: {meaning}")
    return Check("prompts", True, f"{len(golden.answers)} prompts are the same, token by token")


def _check_pictures(processor: VisionLanguageProcessor, golden: Golden, folder: Path) -> Check:
    wrong, worst = [], 0.0
    for picture in golden.pictures:
        try:
            pixels = processor.load_pixels([folder / picture.file])["pixel_values"]
        except ImageError as error:
            wrong.append(str(error))
            continue
        if tuple(pixels.shape) != picture.shape:
            wrong.append(f"{picture.file} is {list(pixels.shape)} and was {list(picture.shape)}")
            continue
        gap = _values(pixels) - torch.tensor(picture.values, dtype=torch.float64)
        mean, largest = abs(float(gap.mean())), float(gap.abs().max())
        worst = max(worst, largest)
        if mean > PIXEL_MEAN_TOLERANCE or largest > PIXEL_TOLERANCE:
            wrong.append(
                f"{picture.file} is off by {mean:.3g} in the mean and {largest:.3g} at most "
                f"(allowed: {PIXEL_MEAN_TOLERANCE}, {PIXEL_TOLERANCE})"
            )
    if wrong:
        meaning = "the tower would get other pixels than in training: image transform (size, crop, mean, std) changed"
        return Check("pictures", False, f"{'; '.join(wrong)}: {meaning}")
    return Check("pictures", True, f"{len(golden.pictures)} pictures give the same pixels, within {worst:.2g}")


def precision_of(model: VisionLanguageModel) -> str:
    """A key of TOLERANCES."""
    if getattr(model.language_model.config, "quantization_config", None):
        return "quantised"
    return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")


def _check_answers(
    model: VisionLanguageModel, processor: VisionLanguageProcessor, golden: Golden, folder: Path, *, retry: bool = True
) -> Check:
    precision = max(precision_of(model), golden.precision, key=TOLERANCES.__getitem__)  # the coarser one of the two
    allowed, allowed_second = (max(nats, TIMES_ROUNDING * golden.rounding) for nats in TOLERANCES[precision])
    wrong, worst, count = [], 0.0, 0
    for answer in golden.answers:
        files = [folder / golden.pictures[index].file for index in answer.pictures]
        try:
            tensors = processor.load_pixels(files) if files else {}
            logits = answer_logits(model, answer.prompt_ids, answer.token_ids, tensors).cpu()
        except (ValueError, RuntimeError, IndexError) as error:
            wrong.append(f"{answer.name} cannot be computed: {error}")
            continue
        logprobs = _logprobs(logits, answer.token_ids)
        moved = (logprobs - torch.tensor(answer.logprobs)).abs()
        below_best = logits.log_softmax(-1).amax(-1) - logprobs
        second = (_logprobs(logits, answer.second_ids) - torch.tensor(answer.second_logprobs)).abs()
        bad = ~((moved <= allowed) & (below_best <= allowed) & (second <= allowed_second))  # so that NaN counts as bad
        count += len(logprobs)
        worst = max(worst, float(moved.max()))
        if bad.any():
            first = int(bad.nonzero()[0])
            now, saved = (
                processor.tokenizer.decode([int(i)]) for i in (logits[first].argmax(), answer.token_ids[first])
            )
            wrong.append(
                f"{answer.name}: {int(bad.sum())} of {len(logprobs)} tokens differ, log-probabilities by "
                f"{float(moved.max()):.2g} (allowed in {precision}: {allowed:.2g}), those of the second choice by "
                f"{float(second.max()):.2g} ({allowed_second:.2g}); token {first} is now {now!r} and was {saved!r}"
            )
    if wrong and retry and count == sum(len(answer.token_ids) for answer in golden.answers):
        rounding = _rounding(model, processor, golden, [folder / picture.file for picture in golden.pictures])
        golden = replace(golden, rounding=max(rounding, golden.rounding))
        return _check_answers(model, processor, golden, folder, retry=False)
    if wrong:
        meaning = "this is not the model that was saved: weights, precision, or the code that runs them changed"
        return Check("answers", False, f"{'; '.join(wrong)}: {meaning}")
    text = f"{count} tokens of {len(golden.answers)} answers in {precision_of(model)}, within {worst:.2g} nats"
    return Check("answers", True, text + (f"; allowed: {allowed:.2g}" if allowed < math.inf else ""))


def require_golden(
    model: VisionLanguageModel, processor: VisionLanguageProcessor, folder: str | Path, *, answers: bool | None = None
) -> None:
    """Raises CheckpointError where `verify_golden` fails. Answers are checked where cheap (CHEAP_PARAMETERS)."""
    if answers is None:
        answers = _is_cheap(model) or model.get_input_embeddings().weight.device.type != "cpu"
    wrong = [check for check in verify_golden(model, processor, folder, answers=answers) if not check.holds]
    if wrong:
        listed = "\n".join(f"  {check.part}: {check.text}" for check in wrong)
        raise CheckpointError(
            f"{folder} does not give its golden answers any more:\n{listed}\n"
            f"copy the folder again, or see `mmllm doctor {folder}`"
        )


def load_verified(
    folder: str | Path, *, dtype: Mapping[str, torch.dtype] | None = None
) -> tuple[VisionLanguageModel, VisionLanguageProcessor, dict[str, Any]]:
    """`load_checkpoint`, which raises CheckpointError also where golden answers show that the model has changed."""
    model, processor, manifest = load_checkpoint(folder, dtype=dtype)
    require_golden(model, processor, folder)
    return model, processor, manifest
