"""A JSON list of a million rows, read whole and read lazily: seconds until the last row is read, and peak memory.

`python -m bench million_rows`. Each way runs in its own process, since a process does not give memory back.
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
    """Writes rows in LLaVA's format, about 400 bytes each, without pictures, so that no picture file is needed."""
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
    """Turns every row into an example, as a run does before it starts, but counts no tokens."""
    from mmllm.config import SourceConfig
    from mmllm.data.check import inspect_sources
    from mmllm.data.inspection import RowRules

    examples, report = inspect_sources([SourceConfig(path=str(path))], RowRules(None, 1), num_processes=1)
    assert len(examples) == report.num_usable == NUM_ROWS


def _imported(path: Path) -> None:
    """Imports what `_checked` imports, mostly torch, and reads no row."""
    import mmllm.data.check  # noqa: F401


WAYS = {"whole": _whole, "lazily": _lazily, "checked": _checked, "imported": _imported}


def _measure(way: str, path: Path) -> tuple[float, float]:
    """(seconds, peak resident MiB) of one way in a fresh process."""
    done = subprocess.run([sys.executable, "-m", __name__, way, str(path)], capture_output=True, text=True, check=True)
    seconds, mebibytes = done.stdout.split()
    return float(seconds), float(mebibytes)


def million_rows() -> dict[str, float]:
    """`json.load` against the index, and the check of all rows that a run makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        _write(path)
        size = path.stat().st_size / 2**20
        results = {way: _measure(way, path) for way in WAYS}
    return {
        "file MiB": size,
        **{f"{way} s": seconds for way, (seconds, _) in results.items()},
        **{f"{way} MiB": mebibytes for way, (_, mebibytes) in results.items()},
        "ratio of memory": results["whole"][1] / results["lazily"][1],
        "ratio of time": results["whole"][0] / results["lazily"][0],
    }


if __name__ == "__main__":
    begun = time.perf_counter()
    WAYS[sys.argv[1]](Path(sys.argv[2]))
    seconds = time.perf_counter() - begun
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
