"""The order of examples and all randomness are functions of seed and step alone."""

from __future__ import annotations

from collections import Counter

import pytest

from mmllm.batching.sampler import IndexedSampler, rank_slice, step_seed

LENGTHS = [(7 * number) % 50 for number in range(96)]


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["any", "grouped"])
def test_every_example_comes_once_an_epoch(lengths: list[int] | None) -> None:
    order = IndexedSampler(96, 8, seed=1, lengths=lengths)
    epochs = [[order.batch(step) for step in range(12 * epoch, 12 * epoch + 12)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(index for batch in epoch for index in batch) == list(range(96))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [batch for epoch in epochs for batch in epoch] != [
        IndexedSampler(96, 8, 2, lengths).batch(s) for s in range(36)
    ]


def test_no_example_is_left_out_for_good_where_the_last_batch_is_not_full() -> None:
    order = IndexedSampler(10, 4, seed=0)
    seen = Counter(index for step in range(2 * 30) for index in order.batch(step))
    assert set(seen) == set(range(10))
    for epoch in range(30):
        drawn = [index for step in (2 * epoch, 2 * epoch + 1) for index in order.batch(step)]
        assert len(set(drawn)) == 8


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["any", "grouped"])
def test_a_batch_is_a_function_of_its_step(lengths: list[int] | None) -> None:
    in_order = IndexedSampler(96, 8, seed=1, lengths=lengths)
    expected = [in_order.batch(step) for step in range(30)]
    for step in (29, 3, 17, 0):
        assert IndexedSampler(96, 8, seed=1, lengths=lengths).batch(step) == expected[step]
        assert in_order.batch(step) == expected[step]


def test_batches_of_like_length_come_in_random_order() -> None:
    order = IndexedSampler(96, 8, seed=1, lengths=LENGTHS)
    batches = [[LENGTHS[index] for index in order.batch(step)] for step in range(12)]
    assert max(max(batch) - min(batch) for batch in batches) <= 10
    shortest = [min(batch) for batch in batches]
    assert shortest not in (sorted(shortest), sorted(shortest, reverse=True))


@pytest.mark.parametrize("groups", [True, False], ids=["grouped", "any"])
def test_the_longest_example_comes_in_the_first_step_and_once_an_epoch(groups: bool) -> None:
    lengths = [*LENGTHS[:70], 1000, *LENGTHS[71:]]
    order = IndexedSampler(96, 8, seed=1, lengths=lengths, group_by_length=groups)
    assert 70 in order.batch(0)
    for epoch in range(2):
        drawn = [index for step in range(12) for index in order.batch(12 * epoch + step)]
        assert sorted(drawn) == list(range(96))
    assert not all(70 in order.batch(12 * epoch) for epoch in range(1, 5)), "later epochs are in random order"


def test_a_batch_of_any_lengths_is_not_grouped_for_knowing_them() -> None:
    spread = [
        LENGTHS[index] for index in IndexedSampler(96, 8, seed=1, lengths=LENGTHS, group_by_length=False).batch(1)
    ]
    assert max(spread) - min(spread) > 20


def test_fewer_examples_than_one_batch_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="3 usable examples are fewer than one global batch of 4"):
        IndexedSampler(3, 4, seed=0)


def test_ranks_share_a_batch_without_gap_or_overlap() -> None:
    batch = list(range(12))
    shares = [rank_slice(batch, rank, 3) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == batch
    assert [len(share) for share in shares] == [4, 4, 4]


def test_every_step_and_rank_has_random_numbers_of_its_own() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)}
    assert len(seeds) == 3 * 20 * 4
    assert step_seed(0, 5, 1) == step_seed(0, 5, 1)
