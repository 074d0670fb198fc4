"""The data of a stage: its training examples, their order, and its validation examples."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmllm.batch import Example
from mmllm.batching.sampler import IndexedSampler, Item, Sampler, StepSplitter, StreamSampler, in_order
from mmllm.chat.renderer import Renderer
from mmllm.config import SourceConfig, StageConfig
from mmllm.data.check import DataReport, load_examples
from mmllm.data.inspection import RowRules, positions_note
from mmllm.data.mix import epoch_counts
from mmllm.data.quarantine import BAD_LIST_FILE, CHECK_FOLDER, read_quarantine
from mmllm.data.sources import DataError, Examples
from mmllm.data.stream import Stream
from mmllm.distributed.ranks import cores_of_process
from mmllm.readers.folders import describe_passed_over


class TrainingData:
    """The mixed sources of `data.train`, followed by `data.replay`. With streaming, only the replay source is indexed.

    Raises DataError if the sources cannot be used.
    """

    def __init__(self, config: StageConfig, renderer: Renderer, *, max_positions: int | None = None):
        self.config, self.renderer, data = config, renderer, config.data
        self.max_positions = max_positions  # tokens that the LLM can take; None: no limit
        self.max_length_tokens = min(data.max_length_tokens, max_positions or data.max_length_tokens)
        if self.max_length_tokens < data.max_length_tokens:
            print(positions_note(data.max_length_tokens, self.max_length_tokens), file=sys.stderr)
        replay = [data.replay.as_source()] if data.replay else []
        self._all = (*data.train, *data.val, *replay)
        self.quarantine = read_quarantine(config.out, self._all)
        indexed = [*([] if data.is_streamed else data.train), *replay]
        self.examples, self.report = self._load(indexed) if indexed else (Examples(), DataReport())
        self.stream: Stream | None = None
        if data.is_streamed:
            rules = RowRules(renderer, data.max_length_tokens, quarantine=self.quarantine, max_positions=max_positions)
            self.stream = Stream(data.train, rules, seed=config.seed, max_bad_fraction=data.max_bad_fraction)
        self.num_examples = None if self.stream else len(self.examples)
        self.lengths: NDArray[np.int64] | None = None if self.stream else self.report.lengths

    def _load(self, sources: list[SourceConfig]) -> tuple[Examples, DataReport]:
        """Loads the usable examples and prints how many rows are left out. Raises DataError if too many are bad."""
        try:
            examples, report = load_examples(
                sources,
                self.renderer,
                self.config.data,
                quarantine=self.quarantine,
                num_processes=cores_of_process(),
                max_positions=self.max_positions,
            )
        except DataError as error:
            hint = (
                f"\n{len(self.quarantine)} rows are listed in {Path(self.config.out) / CHECK_FOLDER / BAD_LIST_FILE}, "
            )
            hint += "which `mmllm check` wrote; run it again if you have repaired pictures"
            raise DataError(f"{error}{hint if self.quarantine else ''}") from error
        if report.num_bad:
            note = f"left out: {report.num_bad} of {report.num_rows} rows; `mmllm check` lists them with their reasons"
            print(note, file=sys.stderr)
        if passed_over := describe_passed_over(report.passed_over):
            print(passed_over, file=sys.stderr)
        return examples, report

    @property
    def may_have_images(self) -> bool:
        return self.stream is not None or self.report.num_images > 0

    def validation(self) -> list[Example]:
        """At most `validation.max_examples` examples of `data.val`; none without `data.val`. Raises DataError."""
        if not self.config.data.val:
            return []
        return evenly_spaced(self._load(list(self.config.data.val))[0], self.config.validation.max_examples)

    def size_of(self, item: Item) -> tuple[int, int]:
        """(tokens, pictures) of an example."""
        if isinstance(item, Example):
            return len(self.renderer.render_example(item).input_ids), len(item.images)
        return int(self.report.lengths[item]), int(self.report.images[item])

    def text_probe(self, validation: list[Example]) -> list[Example]:
        """Text-only conversations that measure what the LLM forgets; none if it is not trained. Raises DataError."""
        path = self.config.validation.text_probe
        if "language" not in self.config.train:
            return []
        candidates = self._load([SourceConfig(path=path)])[0] if path else validation
        text = [example for example in candidates if not example.images]
        if path and not text:
            raise DataError(f"validation.text_probe: every conversation of {path} has a picture; name a text-only file")
        return evenly_spaced(text, self.config.validation.max_text_examples)

    def sampler(self, batch_size: int, split_step: StepSplitter = in_order) -> Sampler:
        """The sampler for global batches of this size. Raises DataError if there are fewer examples than one batch."""
        data, seed = self.config.data, self.config.seed
        replay = (self.examples.sizes[-1], data.replay.fraction) if data.replay else None
        if self.stream:
            return StreamSampler(self.stream, batch_size, seed, replay, split_step)
        sizes = self.examples.sizes[: len(data.train)]
        parts = epoch_counts(sizes, [source.weight for source in data.train], replay)
        return IndexedSampler(
            len(self.examples), batch_size, seed, self.lengths, parts, split_step, group_by_length=data.group_by_length
        )


def evenly_spaced(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count` examples, evenly spaced over the sequence."""
    if len(examples) <= count:
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]
