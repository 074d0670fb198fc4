"""A row's turns while it is read: who speaks, which text, and which picture each `<image>` in it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmllm.batch import IMAGE_TOKEN, Role
from mmllm.data.row_pictures import RowPicture, check_text, kind
from mmllm.readers.files import RowError


@dataclass(frozen=True)
class RowTurn:
    """Who speaks, under which name, and what.

    `pictures` has one place a mark: a picture, the number of one of the row's, or None for the row's next one.
    """

    role: Role
    name: str
    text: str
    pictures: tuple[RowPicture | int | None, ...]


@dataclass(frozen=True)
class Context:
    """What a row does not say itself: where image paths start from, and the question that a caption answers."""

    images: str
    prompt: str


def text_turn(role: Role, name: str, value: Any, where: str) -> RowTurn:
    """A turn of text alone, whose marks stand for pictures of the row."""
    text = check_text(value, where)
    return RowTurn(role, name, text, (None,) * text.count(IMAGE_TOKEN))


def list_of(value: Any, key: str, what: str) -> list[Any]:
    """A list that is not empty; older `datasets` wrote a list of objects as an object of lists. Raises RowError."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            value = [dict(zip(value, one, strict=True)) for one in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise RowError(f"{key} is {'empty' if value == [] else kind(value)}; it must be a list of {what}")
    return value


def object_of(value: Any, where: str, keys: str) -> dict[str, Any]:
    """An object without the keys that are null. Raises RowError."""
    if not isinstance(value, dict):
        raise RowError(f"{where} is {kind(value)}; it must be an object with {keys}")
    return {key: one for key, one in value.items() if one is not None}


def role_of(name: Any, roles: Mapping[str, Role], where: str) -> Role:
    """Who speaks. Raises RowError for anybody else."""
    if not isinstance(name, str) or name not in roles:
        raise RowError(f"{where} is from {name!r}; allowed: {', '.join(roles)}")
    return roles[name]
