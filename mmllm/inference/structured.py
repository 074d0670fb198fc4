"""Answers that match a JSON schema or a regular expression, by llguidance: https://github.com/guidance-ai/llguidance"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.errors import MmllmError
from mmllm.inference.sampling import Sampling


class Grammar:
    """Which tokens may come next in one answer."""

    def __init__(self, matcher: Any, num_logits: int):
        self._matcher, self._num_logits = matcher, num_logits

    def mask(self, scores: Tensor) -> Tensor:
        """Scores [1, V] with -inf for each token that cannot come next. Raises MmllmError for a dead end."""
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)[: self._num_logits] > 0
        if self._matcher.is_error():
            raise MmllmError(f"the answer cannot follow its grammar: {self._matcher.get_error()}")
        mask = torch.zeros(scores.shape[-1], dtype=torch.bool)
        mask[: len(allowed)] = torch.from_numpy(allowed)
        return scores.masked_fill(~mask.to(scores.device), -torch.inf)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


class Grammars:
    """Makes the grammars of requests. The tokenizer is read once, which takes a second for a large vocabulary."""

    def __init__(self, tokenizer: Any, end_token_ids: Sequence[int], num_logits: int):
        self._tokenizer, self._end_token_ids, self._num_logits = tokenizer, list(end_token_ids), num_logits
        self._read_tokenizer: Any = None
        self._lock = threading.Lock()

    def build(self, sampling: Sampling, forced_ids: Sequence[int]) -> Grammar | None:
        """The grammar of an answer that begins with these tokens; None where the settings name none.

        Raises MmllmError where llguidance is missing, the grammar is wrong, or the answer's beginning does not fit it.
        """
        if sampling.json_schema is None and sampling.regex is None:
            return None
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MmllmError(
                "json_schema and regex need llguidance; install it with: pip install 'mmllm[structured]'"
            ) from error
        with self._lock:
            if self._read_tokenizer is None:
                try:
                    self._read_tokenizer = from_tokenizer(
                        self._tokenizer, n_vocab=self._num_logits, eos_token=self._end_token_ids
                    )
                except ValueError as error:
                    raise MmllmError(f"json_schema and regex cannot be used with this tokenizer: {error}") from error
        name = "json_schema" if sampling.regex is None else "regex"
        try:
            if sampling.regex is not None:
                grammar = LLMatcher.grammar_from_regex(sampling.regex)
            else:
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(json.loads(sampling.json_schema or "")))
        except ValueError as error:
            raise MmllmError(f"{name} cannot be used: {error}") from error
        matcher = LLMatcher(self._read_tokenizer, grammar)
        if matcher.is_error():
            raise MmllmError(f"{name} cannot be used: {matcher.get_error()}")
        if forced_ids and not matcher.consume_tokens(list(forced_ids)):
            raise MmllmError(f"the prefix {sampling.prefix!r} does not begin an answer that {name} allows")
        return Grammar(matcher, self._num_logits)
