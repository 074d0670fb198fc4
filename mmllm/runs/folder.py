"""File names in a run's folder. A finished run's checkpoint is in the same folder: see mmllm/checkpoint/folder.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmllm.checkpoint.folder import MANIFEST


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it writes."""

    path: Path

    @property
    def settings(self) -> Path:
        """The resolved settings; they rerun the run."""
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        """Metrics, alarms and warnings, one JSON line each."""
        return self.path / "log.jsonl"

    @property
    def states(self) -> Path:
        """The saved states that an unfinished run resumes from, one folder each."""
        return self.path / "state"

    @property
    def best(self) -> Path:
        """The checkpoint of the lowest validation loss so far."""
        return self.path / "best"

    @property
    def samples(self) -> Path:
        """Answers at each validation, with the pictures as the model saw them."""
        return self.path / "samples"

    @property
    def report(self) -> Path:
        """The report as one HTML file."""
        return self.path / "report.html"

    @property
    def about(self) -> Path:
        """What the report says about the run beyond its log."""
        return self.path / "about.json"

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint of the last step exists."""
        return (self.path / MANIFEST).is_file()
