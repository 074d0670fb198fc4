"""The data of a stage: which examples it trains on, in which order, and on which it is judged."""

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
    """The sources of `data.train`, mixed, with `data.replay` behind them; only the latter is indexed where they stream.

    Raises DataError where they cannot be used.
    """

    def __init__(self, config: StageConfig, renderer: Renderer, *, max_positions: int | None = None):
        self.config, self.renderer, data = config, renderer, config.data
        self.max_positions = max_positions  # the longest row that the LLM can be given; None: no such end
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
        """Raises DataError where too much cannot be used; where less cannot, says so."""
        try:
            found, report = load_examples(
                sources,
                self.renderer,
                self.config.data,
                quarantine=self.quarantine,
                num_processes=cores_of_process(),
                max_positions=self.max_positions,
            )
        except DataError as error:
            listed = (
                f"\n{len(self.quarantine)} rows stand in {Path(self.config.out) / CHECK_FOLDER / BAD_LIST_FILE}, which "
            )
            listed += "`mmllm check` wrote; run it again where pictures were mended"
            raise DataError(f"{error}{listed if self.quarantine else ''}") from error
        if report.num_bad:
            told = f"left out: {report.num_bad} of {report.num_rows} rows; `mmllm check` lists them with their reasons"
            print(told, file=sys.stderr)
        if passed_over := describe_passed_over(report.passed_over):
            print(passed_over, file=sys.stderr)
        return found, report

    @property
    def may_have_images(self) -> bool:
        return self.stream is not None or self.report.num_images > 0

    def validation(self) -> list[Example]:
        """The examples that the run is judged by."""
        if not self.config.data.val:
            return []
        return spread(self._load(list(self.config.data.val))[0], self.config.validation.max_examples)

    def size_of(self, item: Item) -> tuple[int, int]:
        """Tokens and pictures of an example."""
        if isinstance(item, Example):
            return len(self.renderer.render_example(item).input_ids), len(item.images)
        return int(self.report.lengths[item]), int(self.report.images[item])

    def text_probe(self, validation: list[Example]) -> list[Example]:
        """Conversations without pictures that show what a trained LLM forgets; none where it is not trained."""
        path = self.config.validation.text_probe
        if "language" not in self.config.train:
            return []
        found = self._load([SourceConfig(path=path)])[0] if path else validation
        text = [example for example in found if not example.images]
        if path and not text:
            raise DataError(f"validation.text_probe: every conversation of {path} has a picture; name text alone")
        return spread(text, self.config.validation.max_text_examples)

    def sampler(self, batch_size: int, split_step: StepSplitter = in_order) -> Sampler:
        """The order of examples in global batches of this size. Raises DataError where there are too few."""
        data, seed = self.config.data, self.config.seed
        replay = (self.examples.sizes[-1], data.replay.fraction) if data.replay else None
        if self.stream:
            return StreamSampler(self.stream, batch_size, seed, replay, split_step)
        sizes = self.examples.sizes[: len(data.train)]
        parts = epoch_counts(sizes, [source.weight for source in data.train], replay)
        return IndexedSampler(
            len(self.examples), batch_size, seed, self.lengths, parts, split_step, group_by_length=data.group_by_length
        )


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count` examples, taken evenly over the whole."""
    if len(examples) <= count:
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]
