"""Alarms judge by intervals: what cannot be told from blindness is no proof of sight, and what can is no alarm."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmllm.batch import IGNORE_INDEX, Batch
from mmllm.config import AlarmsConfig
from mmllm.evaluation.reliance import MIN_EXAMPLES, reliance_of
from mmllm.runs.alarms import reliance_alarm
from mmllm.training.losses import supervised_counts

CONFIG: Any = SimpleNamespace(
    alarms=AlarmsConfig(min_image_reliance=0.02, reliance_after=0.0, reliance_validations=1),
    optim=SimpleNamespace(max_steps=10), train=("projector", "language"),
)  # fmt: skip


def alarm(reliance: float, error: float | None = None, **tasks: tuple[float, float, float]) -> str | None:
    """The alarm of one validation; tasks are (exact, gain, gain_error)."""
    row: dict[str, Any] = {"step": 5, "image_reliance": reliance}
    if error is not None:
        row["image_reliance_error"] = error
    for name, (exact, gain, gain_error) in tasks.items():
        row |= {f"task/{name}/exact": exact, f"task/{name}/shuffled": exact - gain, f"task/{name}/gain": gain,
                f"task/{name}/gain_error": gain_error}  # fmt: skip
    return reliance_alarm([row], CONFIG)


def test_a_reliance_just_above_the_limit_is_no_proof_of_sight() -> None:
    told = alarm(0.0206, 0.008)
    assert told is not None
    assert "its loss changes by +0.0206 (+-0.016) nats per token; a rise above 0.02 would show that it looks" in told
    assert alarm(0.0206) is None, "without an error the value decides, as in older logs"
    assert alarm(0.5, 0.05) is None
    assert alarm(0.019, 0.0001) is not None


def test_answers_that_the_pictures_do_not_help_are_blindness_where_reliance_is_low() -> None:
    told = alarm(0.03, 0.001, scenes=(0.45, 0.003, 0.01))
    assert told is not None
    assert "task/scenes +0.003 (+-0.02)" in told
    assert alarm(0.03, 0.001, scenes=(0.45, 0.10, 0.02)) is None
    assert alarm(0.03, 0.001, scenes=(0.45, 0.0, 0.01), others=(0.6, 0.3, 0.05)) is None, "one task shows that it looks"
    assert alarm(0.9, 0.01, captions_only=(0.1, 0.0, 0.02)) is None, "it looks, and cannot answer these yet"
    assert alarm(0.03, 0.001, silent=(0.0, 0.0, 0.0)) is None, "no right answer says nothing"


@pytest.mark.parametrize("true_reliance", [0.0, 0.3])
def test_the_error_of_reliance_covers_the_truth(true_reliance: float) -> None:
    rng, inside, rounds = random.Random(0), 0, 200
    for _ in range(rounds):
        counts = [rng.randint(1, 30) for _ in range(40)]
        own = [rng.gauss(2.0, 0.5) * count for count in counts]
        others = [loss + rng.gauss(true_reliance, 0.4) * count for loss, count in zip(own, counts, strict=True)]
        found = reliance_of(own, others, counts)
        inside += abs(found["image_reliance"] - true_reliance) < 2 * found["image_reliance_error"]
    assert 0.88 < inside / rounds < 0.99, "an interval of 95%"
    few = reliance_of(own[: MIN_EXAMPLES - 1], others[: MIN_EXAMPLES - 1], counts[: MIN_EXAMPLES - 1])
    assert set(few) == {"image_reliance"}


def test_supervised_tokens_are_counted_by_example_also_in_packed_rows() -> None:
    x = IGNORE_INDEX
    labels = torch.tensor([[x, x, 5, 6, x, 7, x], [x, 8, 8, 8, 8, x, x]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0]])
    plain = Batch(torch.zeros_like(labels), mask, labels)
    assert supervised_counts(plain) == [3, 4]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 3, 4, 0, 1]])
    packed = Batch(torch.zeros_like(labels), mask, labels, position_ids=positions)
    assert supervised_counts(packed) == [2, 1, 4]
