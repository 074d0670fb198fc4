"""Grammars on tokenizers that nobody here made: byte-level and SentencePiece ones write spaces in different ways."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest
import torch

from mmllm.inference.sampling import Sampling, TokenSampler
from mmllm.inference.structured import Grammars
from tests.builders.real_parts import real_tokenizer

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"what": {"enum": ["a red circle", "nothing"]}, "sides": {"type": "integer", "maximum": 9}},
    "required": ["what", "sides"],
    "additionalProperties": False,
}
PATTERN = r"(yes|no), [a-f]{2,4} / \d\."


@functools.cache
def parts(name: str) -> tuple[Any, Grammars]:
    tokenizer = real_tokenizer(name)
    return tokenizer, Grammars(tokenizer, [tokenizer.eos_token_id], len(tokenizer))


def draw(name: str, sampling: Sampling) -> str:
    """An answer whose every token is drawn at random from those that the grammar allows."""
    tokenizer, grammars = parts(name)
    sampler = TokenSampler(sampling, grammar=grammars.build(sampling, []))
    ids: list[int] = []
    while not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(sampler.choose([], ids, torch.zeros(len(tokenizer))))
        assert len(ids) < 200
    return str(tokenizer.decode(ids[:-1])).strip()


@pytest.mark.parametrize("name", ["mistral v3", "smollm2"])
def test_answers_fit_their_grammar(name: str) -> None:
    for seed in range(2):
        assert re.fullmatch(PATTERN, draw(name, Sampling(temperature=1.0, seed=seed, regex=PATTERN)))
        text = draw(name, Sampling(temperature=1.0, seed=seed, json_schema=json.dumps(SCHEMA)))
        assert json.loads(text)["what"] in ("a red circle", "nothing")


def test_a_slash_is_a_slash_whether_it_is_escaped_or_not() -> None:
    for pattern in (r"a/b", r"a\/b", r"(a\\/b)"):
        text = draw("smollm2", Sampling(temperature=1.0, seed=0, regex=pattern))
        assert re.fullmatch(pattern, text)
