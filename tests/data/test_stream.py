"""Mixed and streamed data: how often each source is shown, and a stream that goes on exactly where it stopped."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmllm.batch import Example
from mmllm.batching.sampler import MAX_SHARD_READERS, IndexedSampler, StreamSampler
from mmllm.config import SourceConfig
from mmllm.data.inspection import RowRules
from mmllm.data.mix import epoch_counts, epoch_items
from mmllm.data.sources import BadRow
from mmllm.data.stream import Stream
from mmllm.readers.files import DataError

NUM_SHARDS, ROWS = 7, 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven shards of up to five rows, of which one row in the third cannot be used."""
    for shard in range(NUM_SHARDS):
        rows = [talk(f"{shard}-{row}") for row in range(ROWS - shard % 2)]
        if shard == 3:
            rows[1] = {"id": "bad", "messages": []}
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def talk(name: str) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": name}]}


def stream(folder: Path, *, seed: int = 0, weight: float = 1.0, max_bad_fraction: float = 1.0, **rules: Any) -> Stream:
    sources = [SourceConfig(path=f"{folder}/*.jsonl", streaming=True, weight=weight)]
    return Stream(sources, RowRules(None, 100, **rules), seed=seed, max_bad_fraction=max_bad_fraction)


def order(folder: Path, batch_size: int = 4, replay: tuple[int, float] | None = None, **given: Any) -> StreamSampler:
    return StreamSampler(stream(folder, **given), batch_size, given.get("seed", 0), replay)


def names(items: Any) -> list[str | int]:
    return [item.id if isinstance(item, Example) else item for item in items]


def steps(one: StreamSampler, first: int, behind: int, rank: int = 0, world: int = 1) -> list[list[str | int]]:
    return [names(one.rank_items(step, rank, world)) for step in range(first, behind)]


def all_rows(folder: Path) -> list[str]:
    found = [
        json.loads(line)["id"] for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    return [name for name in found if name != "bad"]


# Mixing


def test_a_weight_is_how_often_an_epoch_shows_a_row() -> None:
    parts = epoch_counts([10, 10, 9, 3, 0], [1, 3, 0.5, 0.1, 2])
    assert parts == [(10, 10), (10, 30), (9, 4), (3, 1), (0, 0)]
    shown = Counter(epoch_items(parts, 0, 0).tolist())
    assert [shown[item] for item in range(20)] == [1] * 10 + [3] * 10
    assert sum(shown[item] for item in range(20, 29)) == 4
    assert sum(shown.values()) == 45


def test_what_a_fraction_leaves_out_comes_in_the_next_epochs() -> None:
    epochs = [epoch_items([(9, 3)], 5, epoch).tolist() for epoch in range(6)]
    assert sorted(epochs[0] + epochs[1] + epochs[2]) == list(range(9))
    assert epochs[0] == epochs[3]
    assert epoch_items([(9, 3)], 6, 0).tolist() != epochs[0]


@pytest.mark.parametrize(("size", "count"), [(7, 25), (1000, 25), (25, 25)])
def test_replay_is_a_share_of_all_that_is_shown(size: int, count: int) -> None:
    parts = epoch_counts([75, 300], [1, 0.5], (size, 0.1))
    assert parts == [(75, 75), (300, 150), (size, count)]
    one = IndexedSampler(sum(size for size, _ in parts), 10, 0, None, parts)
    seen = Counter(index for step in range(one.batches_per_epoch) for index in one.batch(step))
    assert sum(count for index, count in seen.items() if index >= 375) == 25


def test_an_order_of_a_mix_is_a_function_of_its_step() -> None:
    parts, lengths = epoch_counts([30, 40], [0.5, 2]), [(7 * n) % 50 for n in range(70)]
    one = IndexedSampler(70, 8, 3, lengths, parts)
    expected = [one.batch(step) for step in range(30)]
    assert [IndexedSampler(70, 8, 3, lengths, parts).batch(step) for step in (29, 3)] == [expected[29], expected[3]]
    first = {index for batch in expected[: one.batches_per_epoch] for index in batch if index < 30}
    assert len(first) <= 15


# Streams


def test_every_row_of_a_stream_is_seen_as_often_as_any_other(folder: Path) -> None:
    rows = all_rows(folder)
    one = order(folder, batch_size=1)
    assert one.num_readers == 1
    epochs = [[name for batch in steps(one, 0, len(rows)) for name in batch] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [rows, rows]
    assert epochs[0] != epochs[1]
    in_file_order = [name.split("-")[0] for name in epochs[0]]
    assert sorted(in_file_order) != in_file_order, "shards come in random order"
    assert sum(a != b for a, b in itertools.pairwise(in_file_order)) == NUM_SHARDS - 1


@pytest.mark.parametrize("replay", [None, (11, 0.3)], ids=["alone", "replay"])
@pytest.mark.parametrize("stopped", [1, 3, 8, 23])
def test_a_stream_resumed_at_a_step_shows_what_an_unbroken_one_shows(
    folder: Path, stopped: int, replay: tuple[int, float] | None
) -> None:
    unbroken = steps(order(folder, replay=replay), 0, 40)
    one = order(folder, replay=replay)
    assert steps(one, 0, stopped) == unbroken[:stopped]
    position = json.loads(json.dumps(one.state()))
    again = order(folder, replay=replay)
    again.load_state({int(number): values for number, values in position.items()})
    assert steps(again, stopped, 40) == unbroken[stopped:]
    assert steps(order(folder, seed=1, replay=replay), 0, 40) != unbroken


def test_a_stream_of_one_shard_goes_on_behind_its_last_row(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text("\n".join(json.dumps(talk(str(row))) for row in range(8)))
    unbroken, begun, resumed = (order(tmp_path) for _ in range(3))
    steps(begun, 0, 2)
    resumed.load_state(begun.state())
    assert steps(resumed, 2, 4) == steps(unbroken, 0, 4)[2:]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_stream_without_gap_or_overlap(folder: Path, world: int) -> None:
    whole = steps(order(folder, batch_size=8, replay=(11, 0.25)), 0, 12)
    ranks = [order(folder, batch_size=8, replay=(11, 0.25)) for _ in range(world)]
    shares = [steps(one, 0, 12, rank, world) for rank, one in enumerate(ranks)]
    for step, batch in enumerate(whole):
        assert sorted(map(str, batch)) == sorted(str(name) for share in shares for name in share[step])
    positions = [set(one.state()) for one in ranks]
    assert len(set.union(*positions)) == ranks[0].num_readers == NUM_SHARDS


def test_shards_are_read_side_by_side_by_the_ranks_that_need_them(folder: Path) -> None:
    one = order(folder, batch_size=6)
    one.num_readers = 6  # divided by two ranks without rest
    one.rank_items(0, 1, 2)
    assert set(one.state()) == {1, 3, 5}
    assert order(folder, batch_size=100).num_readers == NUM_SHARDS <= MAX_SHARD_READERS


def test_replay_fills_its_share_of_the_slots(folder: Path) -> None:
    batches = steps(order(folder, batch_size=6, replay=(5, 0.25)), 0, 20)
    replayed = [[name for name in batch if isinstance(name, int)] for batch in batches]
    assert all(len(batch) == 6 for batch in batches)
    assert [len(found) for found in replayed[:4]] == [1, 2, 1, 2]
    shown = [name for found in replayed for name in found]
    assert sorted(shown[:5]) == sorted(shown[5:10]) == list(range(5))


def test_a_weight_counts_shards(folder: Path) -> None:
    assert stream(folder, weight=3).num_shards == 3 * NUM_SHARDS
    assert stream(folder, weight=0.5).num_shards == 4


def test_bad_rows_are_said_counted_and_stop_the_run_past_the_limit(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    one = order(folder, batch_size=1)
    steps(one, 0, len(all_rows(folder)))
    (position,) = one.state().values()
    assert position[2:] == [len(all_rows(folder)) + 1, 1]
    assert "left out, number 1 of" in capsys.readouterr().err
    monkeypatch.setattr("mmllm.data.stream.MIN_SEEN", 1)
    with pytest.raises(DataError, match=r"1 of \d+ streamed rows cannot be used, .*max_bad_fraction = 0.01 .*\(bad\)"):
        steps(order(folder, batch_size=1, max_bad_fraction=0.01), 0, 100)


def test_a_row_of_the_quarantine_is_not_looked_at(folder: Path) -> None:
    name = f"{folder}/0.jsonl@0"
    left_out = {(name, 2): BadRow(name, 2, "0-2", "a broken picture", "picture")}
    one = order(folder, batch_size=1, quarantine=left_out)
    seen = {name for batch in steps(one, 0, 60) for name in batch}
    assert set(all_rows(folder)) - seen == {"0-2"}


def test_a_stream_without_a_usable_row_ends(tmp_path: Path) -> None:
    for shard in range(3):
        (tmp_path / f"{shard}.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no usable example in any shard of"):
        steps(order(tmp_path, batch_size=1), 0, 1)
