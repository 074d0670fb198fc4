"""Checks of single values of a row. Each returns the value, or raises RowError with the place and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmllm.batch import Role
from mmllm.readers.files import LazyImage, RowError


def json_type(value: Any) -> str:
    """The JSON type of a value, with its article, for messages."""
    types = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return types.get(type(value), "bytes" if isinstance(value, bytes | LazyImage) else "a number")


def check_text(value: Any, where: str) -> str:
    """A string that can be tokenised: a lone surrogate cannot."""
    if not isinstance(value, str):
        raise RowError(f"{where} is {json_type(value)}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{where} holds half a character (\\u{ord(value[error.start]):04x}) at {error.start}") from error
    return value


def check_list(value: Any, key: str, items: str) -> list[Any]:
    """A list that is not empty. An object of lists, as older `datasets` wrote a list of objects, is turned into one."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            value = [dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise RowError(f"{key} is {'empty' if value == [] else json_type(value)}; it must be a list of {items}")
    return value


def check_object(value: Any, where: str, keys: str) -> dict[str, Any]:
    """An object, without its keys that are null."""
    if not isinstance(value, dict):
        raise RowError(f"{where} is {json_type(value)}; it must be an object with {keys}")
    return {key: field for key, field in value.items() if field is not None}


def check_role(name: Any, roles: Mapping[str, Role], where: str) -> Role:
    """The role that a speaker's name stands for."""
    if not isinstance(name, str) or name not in roles:
        raise RowError(f"{where} is from {name!r}; allowed: {', '.join(roles)}")
    return roles[name]
