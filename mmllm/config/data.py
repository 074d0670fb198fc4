"""The data: sources, how they are mixed, and how rows become batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmllm.config.base import Fraction, PathText, PositiveInt, Section


class _DataFile(Section):
    """A file, a folder, or a pattern such as `{000..123}.tar` or `*.parquet`; local, or an fsspec URL."""

    path: PathText
    images: PathText | None = None  # the folder that image paths start from; default: the file's own
    prompt: str = "Describe the picture."  # what a caption answers, where rows are captions without a question
    max_examples: PositiveInt | None = None  # the first usable ones


class SourceConfig(_DataFile):
    """One of the sources that are mixed.

    `weight` is how often an epoch shows each row: 3 is three times, 0.5 is every second one, the others in the next
    epoch. With `streaming`, shards (a tar, a row group, megabytes of JSON lines) come in random order, unindexed, and
    the weight counts shards.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    streaming: bool = False

    @model_validator(mode="after")
    def _stream_has_no_first(self) -> SourceConfig:
        if self.streaming and self.max_examples:
            raise ValueError("max_examples needs an index of the rows; take it or streaming out")
        return self


class ReplayConfig(_DataFile):
    """Data of another kind, such as conversations without pictures, as a share of all examples that training sees."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05

    def as_source(self) -> SourceConfig:
        return SourceConfig(**self.model_dump(exclude={"fraction"}))


class DataConfig(Section):
    train: tuple[SourceConfig, ...]
    val: tuple[SourceConfig, ...] = ()
    replay: ReplayConfig | None = None
    max_length_tokens: PositiveInt = 2048
    num_workers: Annotated[int, Field(ge=0)] = 0
    group_by_length: bool = True  # not where data are streamed: their lengths are not known before
    packing: Literal["auto", "always", "never"] = (
        "auto"  # several examples in one row: where it pays, or in every batch
    )
    cache_features: bool = False  # keep the frozen tower's output of every training image on disk
    cache_folder: PathText | None = None  # where; default: `cache` beside `out`, so that runs share it
    max_bad_fraction: Fraction = 0.01  # a run with more unusable examples than this does not start

    @model_validator(mode="after")
    def _streams(self) -> DataConfig:
        if self.is_streamed and not all(source.streaming for source in self.train):
            raise ValueError("train mixes streamed and indexed sources: set streaming for all or none (not for replay)")
        if any(source.streaming or source.weight != 1 for source in self.val):
            raise ValueError("val is read whole and once; set streaming and weight for train alone")
        if self.is_streamed and self.cache_features:
            raise ValueError("cache_features needs all pictures beforehand; take it or streaming out")
        return self

    @property
    def is_streamed(self) -> bool:
        return any(source.streaming for source in self.train)
