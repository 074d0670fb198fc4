"""Rows and micro-batches: nothing is lost or split, rows fit, and what is shaped is worth it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmllm.batch import IGNORE_INDEX
from mmllm.batching.collate import collate
from mmllm.batching.packing import (
    RowCost,
    best_fit,
    longest_row,
    packed_position_ids,
    plan_rows,
    split_by_length,
    split_by_tokens,
    split_step,
)
from mmllm.chat.renderer import RenderedConversation

FREE = RowCost()
DENSE = RowCost(even_width=1000)


def lengths_of(kind: str, count: int = 64) -> list[int]:
    """Lengths as they are in instruction tuning (a long tail), of captions (alike), and odd ones."""
    rng = random.Random(kind)
    with_picture = [min(2048, 600 + int(rng.expovariate(1 / 250))) for _ in range(count)]
    return {
        "tail": [length if rng.random() > 1 / 6 else rng.randint(40, 2048) for length in with_picture],
        "alike": [rng.randint(600, 620) for _ in range(count)],
        "odd": [rng.choice((1, 2, 1999)) for _ in range(count)],
        "equal": [7] * count,
    }[kind]  # fmt: skip


KINDS = ("tail", "alike", "odd", "equal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["best_fit", "balanced", "alike", "always", "auto", "one_row"])
def test_every_example_stands_in_exactly_one_place(kind: str, how: str) -> None:
    lengths = lengths_of(kind)
    ways: dict[str, Callable[[], Any]] = {
        "best_fit": lambda: best_fit(lengths, 2048),
        "balanced": lambda: split_by_tokens(lengths, [length % 3 for length in lengths], 8),
        "alike": lambda: split_by_length(lengths, 8),
        "always": lambda: plan_rows(lengths, "always", DENSE, 2048),
        "auto": lambda: plan_rows(lengths, "auto", DENSE, 2048) or [[number] for number in range(len(lengths))],
        "one_row": lambda: plan_rows(lengths, "auto", RowCost(one_row=True), 2048),
    }
    assert sorted(number for group in ways[how]() for number in group) == list(range(len(lengths)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_within_their_capacity_and_few(kind: str) -> None:
    lengths = lengths_of(kind)
    rows = best_fit(lengths, 2048)
    assert longest_row(rows, lengths) <= 2048
    assert len(rows) <= -(-sum(lengths) // 2048) * 11 / 9 + 1, "within the bound that best fit is known to keep"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_micro_batches_are_as_many_as_asked_for_and_none_is_empty(kind: str, count: int) -> None:
    lengths = lengths_of(kind)
    images = [number % 2 for number in range(64)]
    for groups in (split_by_tokens(lengths, images, count), split_by_length(lengths, 64 // (64 // count))):
        assert all(groups)
    groups = split_by_tokens(lengths, images, count)
    assert len(groups) == count
    tokens = [sum(lengths[number] for number in group) for group in groups]
    assert max(tokens) - min(tokens) <= 2 * max(lengths)


def test_no_micro_batch_gets_most_of_the_pictures() -> None:
    lengths = [100] * 8 + [10] * 24
    images = [0] * 8 + [3] * 24  # balanced by tokens alone, the short ones would stand together
    groups = split_by_tokens(lengths, images, 4)
    assert max(sum(images[number] for number in group) for group in groups) <= 72 / 4 + 3 - 1
    lonely = split_by_tokens([900, 10, 10, 10], [0, 1, 1, 1], 2)
    assert max(sum([0, 1, 1, 1][number] for number in group) for group in lonely) <= 2


def test_auto_packs_where_padding_costs_more_than_attention_and_only_there() -> None:
    tail, same = lengths_of("tail"), lengths_of("alike")
    assert plan_rows(same, "auto", DENSE, 2048) is None, "long rows of a dense mask would cost more"
    packed = plan_rows(tail, "auto", DENSE, 2048)
    assert packed
    assert DENSE.of(len(packed), longest_row(packed, tail)) < 0.8 * DENSE.of(len(tail), max(tail))
    cheap = plan_rows(tail, "auto", RowCost(even_width=1e6), 2048)
    assert cheap
    assert longest_row(cheap, tail) > longest_row(packed, tail), "where attention is cheap, rows are longer"
    assert plan_rows(same, "always", DENSE, 2048), "always is always"


def test_a_step_is_divided_by_length_where_attention_is_dear_and_evenly_where_it_is_not() -> None:
    lengths, images = lengths_of("tail"), [1] * 64
    cheap, dear = RowCost(even_width=1e6), RowCost(even_width=100)
    assert split_step(lengths, images, 8, "auto", cheap) == split_by_tokens(lengths, images, 8)
    assert split_step(lengths, images, 8, "auto", dear) == split_by_length(lengths, 8)
    assert split_step(lengths, images, 8, "always", dear) == split_by_tokens(lengths, images, 8)


def test_an_attention_that_knows_one_packed_row_gets_one() -> None:
    assert plan_rows([5, 3, 9], "always", RowCost(one_row=True), 8) == [[0, 1, 2]]


def test_positions_begin_again_at_each_example_and_at_the_padding() -> None:
    assert packed_position_ids([[3, 1, 2], [4]], 7).tolist() == [[0, 1, 2, 0, 0, 1, 0], [0, 1, 2, 3, 0, 1, 2]]


def test_a_packed_batch_teaches_what_its_examples_teach_alone() -> None:
    rows = [
        RenderedConversation([1, 2, 3], [False, True, True], 0),
        RenderedConversation(
            [4, 5], [True, True], 0
        ),  # its first token is never predicted, not from the example before either
        RenderedConversation([6], [True], 0),
        RenderedConversation([7, 8, 9, 10], [False, False, False, True], 0),
    ]
    names = ["a", "b", "c", "d"]
    packed = collate(rows, pad_token_id=0, example_ids=names, per_row=[3, 1])
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]]
    off = IGNORE_INDEX
    assert packed.labels.tolist() == [[off, 2, 3, off, 5, off], [off, off, off, 10, off, off]]
    assert packed.attention_mask.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    alone = [collate([row], pad_token_id=0, example_ids="x") for row in rows]
    assert packed.num_supervised == sum(one.num_supervised for one in alone) == 4
    assert all(one.position_ids is None for one in alone)
    assert packed.position_ids is not None
    assert torch.equal(packed.to(torch.device("cpu")).position_ids, packed.position_ids)  # type: ignore[arg-type]
