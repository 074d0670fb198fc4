"""Before step 1: the projector learns which words its image tokens stand for, without running the LLM.

An image token is read as a distribution over words of the answers, by its cosine to their embeddings in the LLM. The
mean over a picture's tokens should give the words of the picture's answers, a bag of words after
https://arxiv.org/abs/1511.02251, and each token should lie where the embeddings that it stands for have their mean. So
the LLM reads words where it would read noise, and uses pictures many steps sooner: see bench/RESULTS.md. A word here is
a token that some answers have; it counts the more, the fewer have it, by its inverse document frequency.
"""

from __future__ import annotations

import functools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmllm.batch import Example
from mmllm.config import ConfigError, WordStartConfig
from mmllm.model.vlm import VisionLanguageModel
from mmllm.stages.conversation_batches import BatchMaker

COMMON = 0.6  # a word of more examples than this tells nothing about one of them
RARE = 5  # examples that a word must be in
MAX_WORDS = 2000  # the most frequent ones
MIN_WORDS = 4
BATCH_SIZE = 128
HELD_OUT = 0.05  # of the examples, for the recall
TOKEN_WEIGHT = 0.3  # of the loss that keeps tokens near embeddings; that of the words is 1
FIRST_SCALE = 20.0  # of cosines in the softmax


@dataclass(frozen=True)
class _Pictures:
    """For each example the frozen tower's features, the sizes of its pictures, and which words it has."""

    features: list[Tensor]
    sizes: list[Tensor | None]
    has_word: Tensor  # [E, W], 0 or 1

    @functools.cached_property
    def word_weights(self) -> Tensor:
        """The inverse document frequency of each word: [W]."""
        return -self.has_word.mean(0).clamp(min=1 / len(self.has_word)).log()


class WordReader(nn.Module):
    """Image tokens as distributions over words: [..., D] -> [..., W]. Used before training only."""

    def __init__(self, embeddings: Tensor):
        super().__init__()
        self.embeddings = embeddings  # [W, D]
        self.directions = functional.normalize(embeddings, dim=-1)
        self.norm = embeddings.norm(dim=-1).mean()
        self.log_scale = nn.Parameter(embeddings.new_tensor(FIRST_SCALE).log())
        self.bias = nn.Parameter(embeddings.new_zeros(len(embeddings)))

    def forward(self, tokens: Tensor) -> Tensor:
        cosines = functional.normalize(tokens, dim=-1) @ self.directions.T
        words: Tensor = torch.softmax(self.log_scale.exp() * cosines + self.bias, dim=-1)
        return words

    def distance(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Mean squared distance of tokens [..., D] to the mean of the embeddings of their words [..., W].

        That mean is scaled to the average norm of an embedding; the distance is in squared average norms.
        """
        targets = functional.normalize(words.detach() @ self.embeddings, dim=-1) * self.norm
        distance: Tensor = (tokens - targets).square().sum(-1).mean() / self.norm.square()
        return distance


def start_from_words(
    model: VisionLanguageModel, batches: BatchMaker, examples: Sequence[Example], config: WordStartConfig,
    device: torch.device, seed: int,
) -> str:  # fmt: skip
    """Trains the projector, and nothing else, on `examples`; returns what it reached as a text.

    Tower and projector end on the projector's first device; the LLM, which may fit on no single device, is not moved.
    The newline token of `anyres` and `native` stays as it is. Raises ConfigError where examples have too few words.
    """
    begun = time.perf_counter()
    sample = [example for example in examples if example.images]
    sample = random.Random(seed).sample(sample, min(config.num_examples, len(sample)))
    words, answer_tokens = _words(batches, sample)
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        ids = torch.tensor(words, device=embeddings.weight.device)
        reader = WordReader(embeddings(ids).to(device, torch.float32))
    before, was_training = next(model.projector.parameters()).device, model.training
    generator = torch.Generator().manual_seed(seed)
    _move(model, device)
    model.eval()
    try:
        pictures = _encode(model, batches, sample, words, answer_tokens, device)
        num_train = len(sample) - max(1, int(HELD_OUT * len(sample)))
        parameters = [*(p for p in model.projector.parameters() if p.requires_grad), *reader.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, config.steps)
        for _ in range(config.steps):
            rows = torch.randint(num_train, (min(BATCH_SIZE, num_train),), generator=generator).tolist()
            loss = _loss(model, reader, pictures, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        recall, by_frequency = _recall(model, reader, pictures, num_train)
    finally:
        model.zero_grad(set_to_none=True)  # else the first step of the run would add them to its own
        _move(model, before)
        model.train(was_training)
    return (
        f"word start: {config.steps} steps on {num_train:,} examples, {len(words)} words, in "
        f"{time.perf_counter() - begun:.0f} s; of the words of {len(sample) - num_train} other examples {recall:.2f} "
        f"are read off the picture ({by_frequency:.2f} by frequency alone)"
    )


def _move(model: VisionLanguageModel, device: torch.device) -> None:
    model.vision_tower.to(device)
    model.projector.to(device)
    if model.image_newline is not None:
        model.image_newline.data = model.image_newline.data.to(device)


def _words(batches: BatchMaker, examples: Sequence[Example]) -> tuple[list[int], list[set[int]]]:
    """The token ids that tell examples apart, and those of the answers of each example."""
    answer_tokens = []
    for example in examples:
        rendered = batches.renderer.render_example(example)
        pairs = zip(rendered.input_ids, rendered.is_answer, strict=True)
        answer_tokens.append({token for token, is_answer in pairs if is_answer})
    counts = Counter(token for tokens in answer_tokens for token in tokens)
    words = [word for word, count in counts.most_common() if RARE <= count <= COMMON * len(examples)][:MAX_WORDS]
    if len(words) < MIN_WORDS:
        raise ConfigError(
            f"word_start: of the words in the answers of {len(examples)} examples with pictures, {len(words)} are in "
            f"{RARE} or more of them and in at most {COMMON:.0%}; {MIN_WORDS} are needed. Give more data, or leave "
            "word_start out"
        )
    return words, answer_tokens


@torch.no_grad()
def _encode(
    model: VisionLanguageModel, batches: BatchMaker, examples: Sequence[Example], words: Sequence[int],
    answer_tokens: Sequence[set[int]], device: torch.device,
) -> _Pictures:  # fmt: skip
    features: list[Tensor] = []
    sizes: list[Tensor | None] = []
    has_word = torch.zeros(len(examples), len(words))
    index = {word: number for number, word in enumerate(words)}
    for row, (example, tokens) in enumerate(zip(examples, answer_tokens, strict=True)):
        batch = batches.make([example], use_features=True)
        if (image_features := batch.image_features) is None:
            assert batch.pixel_values is not None
            image_features = model.encode_images(batch.pixel_values.to(device), batch.image_sizes)
        features.append(image_features.to("cpu", torch.bfloat16))
        sizes.append(batch.image_sizes)
        has_word[row, [index[token] for token in tokens if token in index]] = 1
    return _Pictures(features, sizes, has_word.to(device))


def _image_tokens(
    model: VisionLanguageModel, reader: WordReader, pictures: _Pictures, rows: Sequence[int]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:  # fmt: skip
    """(rows, their image tokens [R, M, D], the words of these [R, M, W]), together for examples of equal shapes."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[pictures.features[row].shape if pictures.sizes[row] is None else number].append(row)
    for group in groups.values():
        features = torch.cat([pictures.features[row] for row in group]).to(pictures.has_word.device)
        sizes = pictures.sizes[group[0]]
        tokens = model.project_images(features, sizes).float()
        tokens = tokens.view(len(group), -1, tokens.shape[-1])
        yield group, tokens, reader(tokens)


def _loss(model: VisionLanguageModel, reader: WordReader, pictures: _Pictures, rows: Sequence[int]) -> Tensor:
    losses = []
    for group, tokens, words in _image_tokens(model, reader, pictures, rows):
        targets = pictures.has_word[group] * pictures.word_weights
        word_loss = -(targets * words.mean(1).clamp(min=1e-6).log()).sum(1) / targets.sum(1).clamp(min=1e-6)
        losses.append(word_loss.sum() + TOKEN_WEIGHT * len(group) * reader.distance(tokens, words))
    return torch.stack(losses).sum() / len(rows)


@torch.no_grad()
def _recall(model: VisionLanguageModel, reader: WordReader, pictures: _Pictures, start: int) -> tuple[float, float]:
    """Of the words of examples from `start` on, the share that is among as many likeliest ones; and by frequency."""
    frequent = pictures.has_word[:start].sum(0)
    num_found = num_frequent = num_words = 0.0
    for group, _, words in _image_tokens(model, reader, pictures, range(start, len(pictures.features))):
        for row, likely in zip(group, words.mean(1), strict=True):
            targets = pictures.has_word[row]
            count = int(targets.sum())
            num_found += float(targets[likely.topk(count).indices].sum())
            num_frequent += float(targets[frequent.topk(count).indices].sum())
            num_words += count
    return num_found / max(1, num_words), num_frequent / max(1, num_words)
