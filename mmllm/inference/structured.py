"""Answers that match a JSON schema or a regular expression, by llguidance: https://github.com/guidance-ai/llguidance"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import normalizers
from torch import Tensor

from mmllm.errors import MmllmError
from mmllm.inference.sampling import Sampling

_BARE_SLASH = re.compile(r"(^|[^\\])((?:\\\\)*)/")  # one that no backslash escapes; it would end the pattern


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
                        _without_normalizer(self._tokenizer), n_vocab=self._num_logits, eos_token=self._end_token_ids
                    )
                except ValueError as error:
                    raise MmllmError(f"json_schema and regex cannot be used with this tokenizer: {error}") from error
        name = "json_schema" if sampling.regex is None else "regex"
        grammar = LLMatcher.grammar_from_lark(_lark(sampling))
        matcher = LLMatcher(self._read_tokenizer, grammar)
        if matcher.is_error():
            raise MmllmError(f"{name} cannot be used: {matcher.get_error()}")
        if forced_ids and not matcher.consume_tokens(list(forced_ids)):
            raise MmllmError(f"the prefix {sampling.prefix!r} does not begin an answer that {name} allows")
        return Grammar(matcher, self._num_logits)


def _without_normalizer(tokenizer: Any) -> Any:
    """A byte-level tokenizer that takes texts as they are: llguidance has it encode pieces of answers, such as a space.

    Others keep theirs, which is how SentencePiece's write spaces.
    """
    if (json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}).get("type") != "ByteLevel":
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.normalizer = normalizers.Sequence([])
    return plain


def _lark(sampling: Sampling) -> str:
    """The grammar in llguidance's form of Lark. Many tokenizers put a space before the first word."""
    if sampling.regex is not None:
        pattern = _BARE_SLASH.sub(r"\1\2\/", sampling.regex).replace("\n", r"\n")
        return f"start: /[ ]?({pattern})/"
    try:
        schema = json.loads(sampling.json_schema or "")
    except ValueError as error:
        raise MmllmError(f"json_schema cannot be used: it is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise MmllmError(f"json_schema cannot be used: it must be a JSON object, got {sampling.json_schema}")
    # a model that may write any number of spaces may never write anything else
    schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
    return f'start: " "? answer\nanswer: %json {json.dumps(schema)}'
