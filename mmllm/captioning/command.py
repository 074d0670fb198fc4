"""`mmllm caption`: a caption for each picture. A job that was killed continues where it stopped.

The ledger beside the output, OUT.ledger, knows what is done; the output is made from it, while the job runs and at its
end. A caption that was cut off is marked, and written again by a job that allows a longer one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmllm.captioning import json_lines
from mmllm.captioning.inputs import PictureInputs
from mmllm.captioning.job import CaptionJob
from mmllm.captioning.ledger import REDO, JobSettings, Ledger, from_sql, ledger_path
from mmllm.captioning.lookalikes import describe_repeats
from mmllm.captioning.outputs import check_output, require_free, write_output
from mmllm.captioning.progress import JobProgress
from mmllm.captioning.prompts import PromptTemplate
from mmllm.captioning.quality import FLAGS, check_script
from mmllm.checkpoint.folder import MANIFEST, read_manifest
from mmllm.disk import file_hash
from mmllm.errors import MmllmError
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.locks import exclusive_path
from mmllm.readers.compression import inner_suffix
from mmllm.readers.folders import PICTURE_ENDINGS, describe_passed_over
from mmllm.readers.rows import READERS

MIN_SECONDS_BETWEEN_OUTPUTS = 10.0
MAX_OUTPUT_SHARE = 0.01  # of the time of a running job that may go into writing its output


@dataclass(frozen=True)
class CaptionOptions:
    """What `mmllm caption` takes beside model, inputs and output."""

    prompt: str = "Describe the picture."
    batch_size: int = 16
    max_new_tokens: int = 128
    num_captions: int = 1
    output_format: str = "jsonl"
    redo: Sequence[str] = ()
    image_column: str | None = None
    script: str = "auto"
    retry: bool = True
    prefix: str = ""
    banned: Sequence[str] = ()
    json_schema: str | None = None
    regex: str | None = None
    device: str | None = None
    dtype: str | None = None

    def check(self) -> None:
        """Raises MmllmError for a value that is not allowed."""
        check_script(self.script)
        if wrong := [name for name in self.redo if name not in REDO]:
            raise MmllmError(f"--redo {wrong[0]} is not known; allowed: {', '.join(REDO)}")
        for name in ("batch_size", "num_captions", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise MmllmError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        Sampling(prefix=self.prefix, banned=tuple(self.banned), json_schema=self.json_schema, regex=self.regex)


def caption_pictures(model: Path, inputs: Sequence[str], out: Path, options: CaptionOptions) -> int:
    """Captions every picture that has no caption in the ledger of `out` yet; returns how many of them failed.

    Raises MmllmError where there are no pictures or no model, or where a file or an option cannot be used.
    """
    options.check()
    template = PromptTemplate(options.prompt)
    pictures = PictureInputs(inputs, image_column=options.image_column, columns=template.columns)
    has_list = any(inner_suffix(text) in READERS and inner_suffix(text) != ".tar" for text in pictures.inputs)
    template.check(has_list=has_list)
    if options.image_column is not None and not has_list:
        raise MmllmError(
            f"--image-column {options.image_column} is of a list (.jsonl .csv .parquet), but none is given"
        )
    read_manifest(model)  # a wrong path is reported before anything is searched or written
    check_output(out, options.output_format)
    settings = JobSettings(
        model.resolve().name, file_hash(model / MANIFEST)[:16], options.prompt, options.num_captions, options.script,
        options.retry, options.prefix, tuple(options.banned), options.json_schema, options.regex,
    )  # fmt: skip
    if next(iter(pictures), None) is None:
        passed_over = describe_passed_over(pictures.passed_over)
        searched = ", ".join(pictures.inputs) + (f" ({passed_over})" if passed_over else "")
        raise MmllmError(f"no pictures in {searched}; searched for files that end in {' '.join(PICTURE_ENDINGS)}")
    if options.output_format != "jsonl" and out.is_file() and not ledger_path(out).exists():
        raise MmllmError(
            f"{out} exists, and no captioning job wrote it: {ledger_path(out)} is not there; name another --out"
        )
    with Ledger(ledger_path(out), may_create=True) as ledger:
        output = JobOutput(ledger, out, options.output_format)
        require_free(ledger, out, options.output_format)
        output.take_in()
        num_repeated = ledger.add(pictures, settings, max_new_tokens=options.max_new_tokens, redo=options.redo)
        num_left = _say_what_is_done(ledger, settings)
        _run(model, ledger, output, settings, options, num_left)
        for line in describe_repeats(ledger.database):
            print(line)
        if num_repeated:
            print(f"{num_repeated} pictures were named more than once, and captioned once")
        if passed_over := describe_passed_over(pictures.passed_over):
            print(passed_over)
        num_failed = ledger.count("state = 'failed'")
    if num_failed:
        print(f"{num_failed} failed: {output.failures_path} lists them, and the next run tries them again")
    return num_failed


def _run(
    model: Path, ledger: Ledger, output: JobOutput, settings: JobSettings, options: CaptionOptions, num_left: int
) -> None:
    """Captions what is left, and writes the output whatever happens on the way."""
    progress = JobProgress(num_left)
    for row in ledger.failures(only_mine=True):
        progress.say(f"failed: {row['reason']}")
    job = None
    try:
        if num_left or ledger.num_taken_by_others():
            engine = Engine.load(model, device=options.device, dtype=options.dtype)
            job = CaptionJob(
                engine, ledger, progress, settings, batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens, after_batch=output.refresh,
            )  # fmt: skip
            with progress.bar:
                job.run()
    finally:
        remarks = output.write()
    if job is not None:
        print(summary(job, output.path))
    for remark in remarks:
        print(remark)


class JobOutput:
    """The output of a running job, and the list of the pictures that failed beside it."""

    def __init__(self, ledger: Ledger, path: Path, output_format: str):
        self.ledger, self.path, self.output_format = ledger, path, output_format
        self.failures_path = path.with_name(f"{path.name}.failed.jsonl")
        self._written_at = time.monotonic()
        self._seconds = 0.0

    def take_in(self) -> None:
        """Takes in what a person, or a job of before there was a ledger, has written into the output."""
        if self.output_format != "jsonl":
            return
        has_ledger = self.ledger.has_rows()
        count = json_lines.take_in(self.ledger, self.path)
        if count and has_ledger:
            print(f"{count} lines of {self.path} were changed by another program; they are kept as they are")

    def refresh(self) -> None:
        """Writes the file of lines anew where the last time is long ago; other formats are written at the end."""
        pause = max(MIN_SECONDS_BETWEEN_OUTPUTS, self._seconds / MAX_OUTPUT_SHARE)
        if self.output_format == "jsonl" and time.monotonic() - self._written_at > pause:
            self.write()

    def write(self) -> list[str]:
        """Writes the output from the ledger; jobs that share it do so one after the other."""
        begun = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_path(self.ledger.path.with_name(f"{self.ledger.path.name}.lock")):
            self.take_in()
            remarks = write_output(self.ledger, self.path, self.output_format)
            self._write_failures()
        self._written_at = time.monotonic()
        self._seconds = self._written_at - begun
        return remarks

    def _write_failures(self) -> None:
        partial = self.failures_path.with_name(f"{self.failures_path.name}.part")
        with partial.open("w") as file:
            for row in self.ledger.failures(only_mine=True):
                file.write(json.dumps({"image": from_sql(row["place"]), "error": row["reason"]}) + "\n")
        if partial.stat().st_size:
            partial.replace(self.failures_path)
        else:
            partial.unlink()
            self.failures_path.unlink(missing_ok=True)


def _say_what_is_done(ledger: Ledger, settings: JobSettings) -> int:
    """Says how much of the job an earlier one did; returns how many pictures are left."""
    num_done = ledger.count("record IS NOT NULL")
    num_left = ledger.count("state = 'waiting'")
    if num_done:
        num_other = ledger.count(f"record IS NOT NULL AND made_by <> '{settings.key}'")
        by_others = (
            f" ({num_other} of them by another model or prompt; --redo other makes them anew)" if num_other else ""
        )
        num_cut = ledger.count("state = 'waiting' AND waits_for = 'redo' AND finish = 'length'")
        cut = f", {num_cut} of them cut off before and written again now" if num_cut else ""
        print(
            f"{num_done} of {ledger.count()} pictures have a caption in {ledger.path} already{by_others}; "
            f"{num_left} left{cut}"
        )
    return num_left


def summary(job: CaptionJob, out: Path) -> str:
    """What a job did, and what is wrong with its captions."""
    text = f"{job.num_captioned} pictures captioned in {out}"
    if job.num_moved:
        text += f"\n{job.num_moved} renamed files keep the caption that they had"
    if job.num_unchanged:
        text += f"\n{job.num_unchanged} files have a new date and the same content, and keep their caption"
    if job.num_retried:
        text += f"\n{job.num_retried} of them flagged at first and right at the second try"
    longer = (
        f'"finish": "length": cut off at {job.max_new_tokens} tokens; the same command with --max-new-tokens '
        f"{2 * job.max_new_tokens} writes them again"
    )
    meanings = FLAGS | {"cut": longer, "empty": '"finish": "empty": without words'}
    for flag, meaning in meanings.items():
        if count := job.num_by_flag.get(flag):
            text += f"\n{count} of them flagged {flag} ({meaning})"
    if job.num_by_flag:
        text += f"\nflagged captions are left out where {out} is trained on; see `mmllm caption report`"
    return text
