"""Sampled replies: repeatable by their seed, whatever else is in the batch, and true to the model's probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.errors import MmllmError
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling, TokenSampler
from tests.builders.conversations import MIXED

DRAWN = Sampling(temperature=1.3, max_new_tokens=8, seed=5)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.load(tiny_checkpoint, device="cpu")


def test_a_reply_depends_on_its_seed_and_not_on_its_batch(engine: Engine) -> None:
    together = [reply.text for reply in engine.reply_batch(MIXED, DRAWN)]
    assert together == [engine.reply(example, DRAWN).text for example in MIXED]
    assert together[0] == [*engine.stream(MIXED[0], DRAWN)][-1].text
    others = [engine.reply(MIXED[0], Sampling(temperature=1.3, max_new_tokens=8, seed=seed)).text for seed in range(6)]
    assert len(set(others)) > 1


def test_replies_without_a_seed_differ_and_leave_torchs_generator_alone(engine: Engine) -> None:
    state = torch.get_rng_state()
    texts = {engine.reply(MIXED[0], Sampling(temperature=2.0, max_new_tokens=8)).text for _ in range(6)}
    assert len(texts) > 1
    engine.reply(MIXED[0], DRAWN)
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.reply(MIXED[0], Sampling(temperature=1, max_new_tokens=2)).num_new_tokens == 2, "an integer will do"


def drawn(logits: list[float], **settings: Any) -> Tensor:
    """The share of each token among those that 2,000 seeds draw."""
    counts = torch.zeros(len(logits))
    for seed in range(2000):
        counts[TokenSampler(Sampling(seed=seed, **settings)).choose([], [], torch.tensor(logits))] += 1
    return counts / 2000


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 2.0, "top_p": 0.85}, 3),  # the last token is outside of the 85%
        ({"temperature": 2.0, "top_k": 2}, 2),
        ({"temperature": 2.0, "min_p": 0.5}, 2),  # the third is at exp(-1) of the first
        ({"temperature": 2.0}, 4),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_the_settings(settings: dict[str, Any], kept: int) -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    probs = (torch.tensor(logits[:kept]) / 2).softmax(-1)
    torch.testing.assert_close(drawn(logits, **settings), torch.cat([probs, torch.zeros(4 - kept)]), rtol=0, atol=0.04)


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}])
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(MmllmError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]
