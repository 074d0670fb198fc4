"""Which pictures a captioning job was given: files by name, and all pictures below folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmllm.readers.folders import classify_files


@dataclass
class PictureInputs:
    """The pictures of a job, sorted and without repeats, and what is not captioned."""

    paths: list[str]
    failed: dict[str, str]  # reason by path: folders that cannot be searched, pictures of a kind that is not read
    passed_over: Counter[str]  # number of other files by reason


def find_pictures(inputs: Sequence[Path]) -> PictureInputs:
    """Searches folders at any depth, without following links to other folders.

    An input that is not a folder counts as a picture, whatever its name.
    """
    paths: set[str] = set()
    failed: dict[str, str] = {}
    passed_over: Counter[str] = Counter()

    def add_failure(error: OSError) -> None:
        failed[str(error.filename)] = f"{error.filename} cannot be searched ({error.strerror}); check its rights"

    for input_path in dict.fromkeys(inputs):
        if not input_path.is_dir():
            paths.add(str(input_path))
            continue
        walked = os.walk(input_path, onerror=add_failure)
        names = [str(Path(folder, name).relative_to(input_path)) for folder, _, names in walked for name in names]
        files = classify_files(names)
        paths |= {str(input_path / name) for name in files.pictures}
        failed |= {str(input_path / name): f"{input_path / name} is {reason}" for name, reason in files.unread.items()}
        passed_over += files.passed_over
    return PictureInputs(sorted(paths), failed, passed_over)
