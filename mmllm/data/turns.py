"""A row's turns while it is read: who speaks, which text, and which picture each `<image>` mark in it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmllm.batch import IMAGE_TOKEN, Role
from mmllm.data.row_pictures import RowPicture
from mmllm.data.row_values import check_text


@dataclass(frozen=True)
class RowTurn:
    """One turn: its role, the name that the file has for the role, and its text.

    `pictures` has one entry for each mark: a picture, the index of one of the row's pictures, or None for the next of
    the row's pictures.
    """

    role: Role
    name: str
    text: str
    pictures: tuple[RowPicture | int | None, ...]


@dataclass(frozen=True)
class SourceContext:
    """What a row gets from its source: the folder that image paths start from, and the question of a bare caption."""

    image_folder: str
    caption_prompt: str


def text_turn(role: Role, name: str, value: Any, where: str) -> RowTurn:
    """A turn of text, whose marks stand for the row's pictures in order. Raises RowError."""
    text = check_text(value, where)
    return RowTurn(role, name, text, (None,) * text.count(IMAGE_TOKEN))
