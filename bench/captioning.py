"""What the ledger of a captioning job costs: its share of the time of a real job, and memory by the number of pictures.

`python -m bench captioning`. The share is measured on the embedded default and the pictures of data/scenes/val. Memory
is measured with replies that need no model, since only the number of pictures matters to it; each number of pictures in
a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

MODEL = Path("runs/tiny/stage2")
PICTURES = "data/scenes/val/images"
COUNTS = (1_000, 20_000)
LEDGER_METHODS = ("add", "count", "take", "captions_of", "move_caption", "finish", "num_taken_by_others")


def _share(folder: Path) -> tuple[float, float]:
    """(seconds of a job, seconds of it in the ledger and in writing the output)."""
    from mmllm.captioning.command import CaptionOptions, JobOutput, caption_pictures
    from mmllm.captioning.job import CaptionJob
    from mmllm.captioning.ledger import Ledger

    seconds = {"job": 0.0, "ledger": 0.0}

    def timed(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                seconds[kind] += time.perf_counter() - begun

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(CaptionJob, "run", timed("job", CaptionJob.run)))
        for kind, name in [*((Ledger, name) for name in LEDGER_METHODS), (JobOutput, "write")]:
            stack.enter_context(patch.object(kind, name, timed("ledger", getattr(kind, name))))
        caption_pictures(MODEL, [PICTURES], folder / "captions.jsonl", CaptionOptions())
    return seconds["job"], seconds["ledger"]


def _grow(folder: Path, count: int) -> tuple[float, float]:
    """(seconds, peak resident MiB) of a job of so many tiny pictures, without a model."""
    from PIL import Image

    from mmllm.captioning.command import CaptionOptions, caption_pictures
    from mmllm.inference.engine import Engine, Reply

    for number in range(count):
        inner = folder / "in" / str(number // 1000)
        inner.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number % 256, number // 256 % 256, number // 65536)).save(inner / f"{number}.bmp")

    def reply(engine: Engine, examples: Any, sampling: Any) -> list[Reply]:
        return [Reply(f"picture {example.id}", "end", 10, 1, 5, 0.0) for example in examples]

    begun = time.perf_counter()
    with patch.object(Engine, "reply_batch", reply):
        caption_pictures(MODEL, [str(folder / "in")], folder / "captions.jsonl", CaptionOptions(batch_size=64))
    return time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(*arguments: object) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-m", __name__, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.split()
    return float(first), float(second)


def captioning() -> dict[str, float]:
    """The ledger's share of a job, and the memory of small and large jobs."""
    job, ledger = _measure("share")
    results = {"job": job, "ledger": ledger, "ratio of ledger to job": ledger / job}
    for count in COUNTS:
        results[f"{count} pictures s"], results[f"{count} pictures MiB"] = _measure("grow", count)
    return results


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        figures = _share(Path(temporary)) if sys.argv[1] == "share" else _grow(Path(temporary), int(sys.argv[2]))
    print(*figures)
