"""`mmllm caption`: one JSON line for each picture. A job that was killed continues where it stopped.

The output file is locked while a job writes it, and flushed after each batch. A picture is known by its path as the
user wrote it. A caption that was cut off is marked, and written again by a job that allows a longer one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmllm.captioning.inputs import find_pictures
from mmllm.captioning.job import CaptionJob
from mmllm.captioning.ledger import DoneCaption, Ledger
from mmllm.captioning.progress import FailureList, JobProgress
from mmllm.checkpoint.folder import MANIFEST, read_manifest
from mmllm.disk import file_hash
from mmllm.errors import MmllmError
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.readers.folders import PICTURE_ENDINGS, describe_passed_over


def caption_pictures(
    model: Path,
    inputs: list[Path],
    out: Path,
    *,
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
    device: str | None,
    dtype: str | None = None,
) -> int:
    """Captions every picture that has no line in `out` yet; returns the number of pictures that failed.

    Raises MmllmError where there are no pictures or no model, or where another run is writing the same file.
    """
    if not prompt.strip():
        raise MmllmError("the prompt is empty; give the question to ask about each picture")
    read_manifest(model)  # a wrong path is reported before anything is searched or written
    pictures = find_pictures(inputs)
    passed_over = describe_passed_over(pictures.passed_over)
    if not pictures.paths and not pictures.failed:
        searched = ", ".join(map(str, inputs)) + (f" ({passed_over})" if passed_over else "")
        raise MmllmError(f"no pictures in {searched}; searched for files that end in {' '.join(PICTURE_ENDINGS)}")
    stamp = {"model": model.resolve().name, "model_hash": file_hash(model / MANIFEST)[:16], "prompt": prompt}
    with Ledger(out) as ledger:
        # a caption that was cut off is written again where it may be longer now
        todo = [path for path in pictures.paths if not _is_done(ledger.done.get(path), stamp, max_new_tokens)]
        _say_what_is_done(ledger, pictures.paths, todo, stamp)
        engine = Engine.load(model, device=device, dtype=dtype) if todo else None
        progress = JobProgress(len(todo))
        failures = FailureList(out, progress)
        for path, reason in pictures.failed.items():
            failures.add(path, reason)
        if engine is not None:
            job = CaptionJob(engine, ledger, failures, progress, stamp)
            with progress.bar:
                job.run(todo, batch_size, Sampling(max_new_tokens=max_new_tokens))
            ledger.drop_replaced()
            print(job.summary(out))
    if passed_over:
        print(passed_over)
    if failures.count:
        print(f"{failures.count} failed: {failures.path} lists them, and the next run tries them again")
    return failures.count


def _is_done(caption: DoneCaption | None, stamp: Mapping[str, str], max_new_tokens: int) -> bool:
    if caption is None:
        return False
    return caption.cut_at is None or caption.cut_at >= max_new_tokens or not caption.is_of(stamp)


def _say_what_is_done(ledger: Ledger, pictures: list[str], todo: list[str], stamp: dict[str, str]) -> None:
    done = [ledger.done[path] for path in pictures if path in ledger.done]
    if not done:
        return
    num_other = sum(not caption.is_of(stamp) for caption in done)
    by_others = f" ({num_other} of them by another model or prompt)" if num_other else ""
    num_again = sum(path in ledger.done for path in todo)
    cut = f", {num_again} of them cut off before and written again now" if num_again else ""
    print(
        f"{len(done)} of {len(pictures)} pictures have a caption in {ledger.path} already{by_others}; "
        f"{len(todo)} left{cut}"
    )
