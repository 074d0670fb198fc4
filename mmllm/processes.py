"""Work that new processes of this machine share, or that is done here where it is one piece."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

Result = TypeVar("Result")


def map_in_processes(
    function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], *, num_processes: int | None = None
) -> Iterator[Result]:
    """`function(*task)` of each task, in their order; a task that fails raises its error here.

    A new process first imports what the function needs, which takes seconds, so one task, or one process, is no reason
    for a new one.

    Args:
        num_processes: how many at most; default: as many as this machine has cores.
    """
    num_processes = min(num_processes or os.cpu_count() or 1, len(tasks))
    if num_processes <= 1:
        yield from (function(*task) for task in tasks)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever stops asking does not wait for the rest
