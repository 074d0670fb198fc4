"""A JSON list of a million rows read whole against read lazily: seconds until the last row is there, peak memory.

`python -m bench million_rows`; every way runs in a process of its own, since memory once taken is not given back.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_ROWS = 1_000_000


def _write(path: Path) -> None:
    """Rows as LLaVA's, about 400 bytes each, without pictures, so that none has to be looked for."""
    with path.open("w") as file:
        file.write("[")
        for number in range(NUM_ROWS):
            turns = [
                {"from": "human", "value": f"What is said about number {number}?\n" + "Say it in a few words. " * 5},
                {"from": "gpt", "value": f'It is "{number}", and [that] is all.' * 3},
            ]
            file.write((",\n" if number else "") + json.dumps({"id": f"{number:09}", "conversations": turns}))
        file.write("]\n")


def _whole(path: Path) -> None:
    with path.open() as file:
        rows = json.load(file)
    assert rows[-1]["id"] == f"{NUM_ROWS - 1:09}"


def _lazily(path: Path) -> None:
    from mmllm.readers.rows import open_rows

    rows = open_rows(str(path))
    assert rows[len(rows) - 1]["id"] == f"{NUM_ROWS - 1:09}"


def _checked(path: Path) -> None:
    """Every row is parsed and made an example, as a run does before it starts, but for its tokens."""
    from mmllm.config import SourceConfig
    from mmllm.data.check import inspect_sources
    from mmllm.data.inspection import RowRules

    examples, report = inspect_sources([SourceConfig(path=str(path))], RowRules(None, 1), num_processes=1)
    assert len(examples) == report.num_usable == NUM_ROWS


def _imported(path: Path) -> None:
    """What `_checked` imports, torch above all, without any row."""
    import mmllm.data.check  # noqa: F401


WAYS = {"whole": _whole, "lazily": _lazily, "checked": _checked, "imported": _imported}


def _measure(way: str, path: Path) -> tuple[float, float]:
    """(seconds, peak resident MiB) of one way in a fresh process."""
    done = subprocess.run([sys.executable, "-m", __name__, way, str(path)], capture_output=True, text=True, check=True)
    seconds, mebibytes = done.stdout.split()
    return float(seconds), float(mebibytes)


def million_rows() -> dict[str, float]:
    """`json.load` against the index, and the pass over all rows that a run makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        _write(path)
        size = path.stat().st_size / 2**20
        found = {way: _measure(way, path) for way in WAYS}
    return {
        "file MiB": size,
        **{f"{way} s": seconds for way, (seconds, _) in found.items()},
        **{f"{way} MiB": mebibytes for way, (_, mebibytes) in found.items()},
        "ratio of memory": found["whole"][1] / found["lazily"][1],
        "ratio of time": found["whole"][0] / found["lazily"][0],
    }


if __name__ == "__main__":
    begun = time.perf_counter()
    WAYS[sys.argv[1]](Path(sys.argv[2]))
    taken = time.perf_counter() - begun
    print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
