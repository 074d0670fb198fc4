"""The data: sources, how they are mixed, and how rows become batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmllm.config.base import RESUMABLE, Fraction, NotNegativeInt, PathText, Positive, PositiveInt, Section


class _DataFile(Section):
    path: PathText
    """A file, a folder, or a pattern such as `{000..123}.tar` or `*.parquet`; local, or an fsspec URL."""
    images: PathText | None = None
    """The folder that image paths start from. Default: the file's own."""
    prompt: str = "Describe the picture."
    """The question before a caption, where rows are captions."""
    max_examples: PositiveInt | None = None
    """Use the first usable rows, at most so many. Default: all."""


class SourceConfig(_DataFile):
    """One of the sources that are mixed."""

    weight: Positive = 1.0
    """How often an epoch shows each row: 3 is three times, 0.5 is every second row, and the others in the next epoch.
    Of a streamed source it counts shards."""
    streaming: bool = False
    """Read shards (a tar, a row group, megabytes of JSON lines) in random order, without an index of the rows."""

    @model_validator(mode="after")
    def _stream_has_no_first(self) -> SourceConfig:
        if self.streaming and self.max_examples:
            raise ValueError("max_examples needs an index of the rows; take it or streaming out")
        return self


class ReplayConfig(_DataFile):
    """Data of another kind, such as conversations without pictures, as a share of all examples that training sees."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The share of all examples that come from this source."""

    def as_source(self) -> SourceConfig:
        return SourceConfig(**self.model_dump(exclude={"fraction"}))


class DataConfig(Section):
    """What is trained and validated on."""

    train: tuple[SourceConfig, ...]
    """The sources that training mixes."""
    val: tuple[SourceConfig, ...] = ()
    """The sources that a validation reads: whole and once each."""
    replay: ReplayConfig | None = None
    """A source that is mixed in as a fixed share of all examples. Default: none."""
    max_length_tokens: PositiveInt = 2048
    """The most tokens of an example, image tokens included; longer ones are left out."""
    num_workers: Annotated[NotNegativeInt, RESUMABLE] = 0
    """Processes that read and decode ahead, of each training process. 0 reads in the training process itself."""
    group_by_length: bool = True
    """Put examples of like lengths into one batch, so that little is padded. Not where data are streamed: their lengths
    are not known before."""
    packing: Annotated[Literal["auto", "always", "never"], RESUMABLE] = "auto"
    """Put several examples into one row: where it pays, in every batch, or never. They do not see each other."""
    cache_features: bool = False
    """Keep the frozen vision tower's output of every training image on disk."""
    cache_folder: Annotated[PathText | None, RESUMABLE] = None
    """The folder of that cache. Default: `cache` beside `out`, so that runs share it."""
    max_bad_fraction: Fraction = 0.01
    """A run with a larger share of unusable examples does not start."""

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
