"""Prompts with fields: `{name}`, `{folder}`, `{tags}`, and the columns of a list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mmllm.errors import MmllmError
from mmllm.readers.files import RowError

# Only a word in braces is a field, so JSON in a prompt stays as it is.
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")
FIELDS = {
    "name": "the file's name without its ending",
    "folder": "the name of its folder",
    "tags": "the text of the .txt file beside it, or the column of that name",
}
MAX_TAG_BYTES = 10_000


class PromptTemplate:
    """A prompt that is filled in for each picture."""

    def __init__(self, text: str):
        """Raises MmllmError for an empty prompt."""
        if not text.strip():
            raise MmllmError("the prompt is empty; give the question to ask about each picture")
        self.text = text
        self.names = list(dict.fromkeys(_FIELD.findall(text)))

    @property
    def columns(self) -> list[str]:
        """The fields that only a list has; one of them may be `tags`."""
        return [name for name in self.names if name not in ("name", "folder")]

    def check(self, *, has_list: bool) -> None:
        """Raises MmllmError for a field that no input of the job can fill."""
        unknown = [name for name in self.names if name not in FIELDS]
        if unknown and not has_list:
            allowed = ", ".join(f"{{{name}}} ({meaning})" for name, meaning in FIELDS.items())
            raise MmllmError(
                f"the prompt has the field {{{unknown[0]}}}, but no input is a list with such a column; allowed: "
                f"{allowed}"
            )

    def fill(self, place: str, origin: str, fields: Mapping[str, Any]) -> str:
        """The prompt of one picture. Raises RowError where a field has no value."""
        return _FIELD.sub(lambda match: self._value(match[1], place, origin, fields), self.text)

    def _value(self, name: str, place: str, origin: str, fields: Mapping[str, Any]) -> str:
        if name in fields:
            return str(fields[name])
        path = PurePosixPath(place)
        if name == "name":
            return path.stem
        if name == "folder":
            return path.parent.name
        if name == "tags" and not origin:
            return _read_tags(Path(place).with_suffix(".txt"))
        raise RowError(f"{place} has no {name}, which the prompt names as {{{name}}}")


def _read_tags(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_TAG_BYTES).decode("utf-8-sig", errors="replace").strip()
    except FileNotFoundError as error:
        raise RowError(f"there is no {path}, whose text the prompt names as {{tags}}") from error
