"""Work for several processes: in its order, and done here where there is one piece of it."""

from __future__ import annotations

import os

import pytest

from mmllm.processes import map_in_processes


def double(number: int) -> tuple[int, int]:
    """Twice the number, and the process that says so."""
    if number < 0:
        raise ValueError(f"{number} is negative")
    return 2 * number, os.getpid()


def test_several_pieces_are_done_elsewhere_and_come_in_their_order() -> None:
    done = list(map_in_processes(double, [(number,) for number in range(5)], num_processes=2))
    assert [value for value, _ in done] == [0, 2, 4, 6, 8]
    assert os.getpid() not in {process for _, process in done}


@pytest.mark.parametrize(("count", "num_processes"), [(0, 2), (1, 2), (3, 1)])
def test_one_piece_or_one_process_starts_no_other(count: int, num_processes: int) -> None:
    done = map_in_processes(double, [(number,) for number in range(count)], num_processes=num_processes)
    assert list(done) == [(2 * number, os.getpid()) for number in range(count)]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_arrives_where_the_work_was_asked_for(num_processes: int) -> None:
    results = map_in_processes(double, [(1,), (-1,), (2,)], num_processes=num_processes)
    assert next(results)[0] == 2
    with pytest.raises(ValueError, match="-1 is negative"):
        next(results)
