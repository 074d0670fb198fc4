"""Sampling of a reply's tokens: greedy, or random with a separate generator for each request.

A request has one TokenSampler, which sees the logits of its own row alone. So a reply depends on its settings and its
seed, and on nothing that shares its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmllm.errors import MmllmError

if TYPE_CHECKING:
    from mmllm.inference.structured import Grammar


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a reply. `temperature` 0 is greedy; `seed` makes a sampled reply repeatable.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: samples from the likeliest tokens of this total probability.
        max_new_tokens: the longest answer.
        seed: of this request's own generator; None: another at each call.
        top_k: samples from this many likeliest tokens; 0: from all.
        min_p: drops tokens less likely than this share of the likeliest one's probability.
        repetition_penalty: divides the logits of tokens in the prompt or answer; 1 changes nothing.
            https://arxiv.org/abs/1909.05858
        presence_penalty: subtracted from the logits of tokens that are in the answer.
        stop: the answer ends before the first of these texts.
        banned: texts that the answer must not contain, in upper or lower case.
        prefix: the answer begins with this text.
        n: number of replies to sample; `Reply.others` has those after the first. The seed of each is one more.
        logprobs: whether `Reply.logprobs` has the log probability of each new token, before these settings change it.
        json_schema: the answer is JSON of this schema, as a JSON text; needs mmllm[structured].
        regex: the answer matches this regular expression; needs mmllm[structured].

    Raises MmllmError for a value that is out of range.

    Example:
        import mmllm

        model = mmllm.load("runs/tiny/stage2")
        sampling = mmllm.Sampling(temperature=0.7, top_p=0.9, max_new_tokens=32, seed=1)
        print(model.ask("Describe the picture.", ["data/scenes/val/images/000003.png"], sampling).text)
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()
    prefix: str = ""
    n: int = 1
    logprobs: bool = False
    json_schema: str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        for is_allowed, problem in (
            (self.temperature >= 0, f"temperature must be 0 (greedy) or more, got {self.temperature}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}"),
            (self.top_k >= 0, f"top_k must be 0 (all tokens) or more, got {self.top_k}"),
            (0 <= self.min_p <= 1, f"min_p must be from 0 to 1, got {self.min_p}"),
            (
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                f"repetition_penalty must be above 0, got {self.repetition_penalty}; 1 changes nothing",
            ),
            (
                math.isfinite(self.presence_penalty),
                f"presence_penalty must be a finite number, got {self.presence_penalty}; 0 changes nothing",
            ),
            (self.n >= 1, f"n must be at least 1, got {self.n}"),
            (self.n == 1 or self.temperature > 0, f"n={self.n} greedy replies are the same; set a temperature above 0"),
            (
                self.json_schema is None or self.regex is None,
                "json_schema and regex cannot be combined; give one of them",
            ),
        ):
            if not is_allowed:
                raise MmllmError(problem)
        for name in ("stop", "banned"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
                raise MmllmError(f"{name} must be a sequence of texts that are not empty, got {texts!r}")

        if self.has_banned(self.prefix) or self.has_stop(self.prefix):
            raise MmllmError(f"the prefix {self.prefix!r} contains a banned or stop text; change one of them")

    def cut(self, text: str, *, is_finished: bool) -> str:
        """The text before the first stop text. Of an unfinished answer, what may become a stop text is held back."""
        text = text[: min((place for one in self.stop if (place := text.find(one)) >= 0), default=len(text))]
        if not is_finished:
            beginnings = {one[:length] for one in self.stop for length in range(1, len(one))}
            text = text[: len(text) - max((len(one) for one in beginnings if text.endswith(one)), default=0)]
        return text

    def has_stop(self, text: str) -> bool:
        return any(one in text for one in self.stop)

    def has_banned(self, text: str) -> bool:
        return any(one.casefold() in text.casefold() for one in self.banned)


GREEDY = Sampling()


class TokenSampler:
    """Chooses the next token of one request. The global generator of torch stays unchanged.

    Args:
        number: which of `sampling.n` replies this is.
        decode: the answer's text of its tokens, for `banned`.
        grammar: the matcher of `json_schema` or `regex`.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        number: int = 0,
        decode: Callable[[Sequence[int]], str] | None = None,
        grammar: Grammar | None = None,
    ):
        assert decode or not sampling.banned
        self.sampling, self.grammar, self._decode = sampling, grammar, decode
        self._seed = None if sampling.seed is None else sampling.seed + number
        self._generator: torch.Generator | None = None
        self._warpers = LogitsProcessorList(_warpers(sampling)) if sampling.temperature > 0 else None

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest one, and nothing else of the logits matters."""
        sampling = self.sampling
        return not (
            self._warpers is not None
            or self.grammar
            or sampling.banned
            or sampling.logprobs
            or sampling.presence_penalty
            or sampling.repetition_penalty != 1
        )

    def choose(self, prompt_ids: Sequence[int], answer_ids: Sequence[int], logits: Tensor) -> int:
        """The next token by the logits [V] of this row. Raises MmllmError where the settings leave no token."""
        scores = logits.float()[None]  # [1, V]
        answer = torch.tensor(answer_ids, dtype=torch.long, device=scores.device)
        ids = torch.cat([torch.tensor(prompt_ids, dtype=torch.long, device=scores.device), answer])[None]
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
        if sampling.presence_penalty:
            seen = answer.unique()
            scores = scores.index_add(1, seen, scores.new_full((1, len(seen)), -sampling.presence_penalty))
        if self.grammar:
            scores = self.grammar.mask(scores)
        while True:
            token = self._draw(ids, scores)
            if not sampling.banned or not sampling.has_banned(self._text([*answer_ids, token])):
                break
            scores = scores.clone()
            scores[0, token] = -torch.inf
            if not torch.isfinite(scores).any():
                raise MmllmError("the banned texts leave no token that the grammar allows; ban fewer of them")
        if self.grammar:
            self.grammar.accept(token)
        return token

    def _text(self, ids: Sequence[int]) -> str:
        assert self._decode
        return self._decode(ids)

    def _draw(self, ids: Tensor, scores: Tensor) -> int:
        if self._warpers is None:
            return int(scores.argmax())
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            if self._seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._seed)
        probs = self._warpers(ids, scores).softmax(-1)
        return int(torch.multinomial(probs[0], 1, generator=self._generator))


def _warpers(sampling: Sampling) -> list[Any]:
    """In the order of transformers' `generate`."""
    warpers: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(float(sampling.min_p)))
    return warpers
