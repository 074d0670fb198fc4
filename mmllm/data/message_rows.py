"""Rows of `messages` as OpenAI's client, TRL and transformers write them: a role, and text or a list of parts.

Exporters write many keys that hold null, an empty list or an empty text; these are ignored. A key with a value that is
not trained on, such as a tool call, makes the row unusable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmllm.batch import IMAGE_TOKEN, Role
from mmllm.data.row_pictures import RowPicture, parse_base64_picture, parse_picture
from mmllm.data.row_values import check_list, check_object, check_role, check_text, json_type
from mmllm.data.turns import RowTurn, SourceContext, text_turn
from mmllm.readers.files import RowError

# "developer" is what OpenAI calls the system role of its newer models.
MESSAGE_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TOOL_ROLES = {"tool", "function", "ipython", "tool_result"}
_IGNORED_KEYS = {"name", "index", "id"}  # of a message
# Values of OpenAI's and axolotl's keys that mean: train on this message.
_TRAINED_VALUES = {"weight": (1,), "loss": (True, 1), "train": (True,), "end_turn": (True,)}
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image")
PART_TYPES = (*_TEXT_TYPES, *_IMAGE_TYPES)
_IMAGE_KEYS = ("image", "image_url", "path", "url", "base64", "bytes", "source")


def message_turns(fields: Mapping[str, Any], context: SourceContext) -> list[RowTurn]:
    """The turns of `messages`. Raises RowError."""
    turns = []
    for index, value in enumerate(check_list(fields["messages"], "messages", "turns")):
        where = f"turn {index}"
        turn = check_object(value, where, "role and content")
        if turn.get("role") in _TOOL_ROLES:
            raise RowError(f"{where} is from {turn['role']}: answers of tools are not trained on; remove the row")
        role = check_role(turn.get("role"), MESSAGE_ROLES, where)
        if others := sorted(key for key in turn if key not in ("role", "content") and _has_meaning(key, turn[key])):
            raise RowError(f"{where} has {', '.join(others)}, which is not trained on; allowed: role, content")
        content = turn.get("content")
        if isinstance(content, list):
            turns.append(_parts_turn(role, content, where))
        else:
            turns.append(text_turn(role, role, content, f"content of {where}"))
    return turns


def _has_meaning(key: str, value: Any) -> bool:
    """Whether a key of a message says something that training would have to respect."""
    if key in _IGNORED_KEYS or any(
        value == default and type(value) is not str for default in _TRAINED_VALUES.get(key, ())
    ):
        return False
    return value not in (None, "", [], {}) and not (isinstance(value, dict) and all(v is None for v in value.values()))


def _parts_turn(role: Role, parts: list[Any], where: str) -> RowTurn:
    text, pictures = "", list[RowPicture | int | None]()
    for number, value in enumerate(parts):
        here = f"part {number} of {where}"
        part = check_object(value, here, "a type")
        type_ = part.get("type")
        if not isinstance(type_, str) or type_ not in PART_TYPES:
            raise RowError(f"{here} is of type {type_!r}; allowed: {', '.join(PART_TYPES)}")
        image_keys = [key for key in _IMAGE_KEYS if part.get(key) not in ("", [], {}, None)]
        if type_ in _TEXT_TYPES:
            if image_keys:
                raise RowError(f"{here} is of type {type_} but has {', '.join(image_keys)}; make it two parts")
            piece = check_text(part.get("text"), f"text of {here}")
            text += piece
            pictures += [None] * piece.count(IMAGE_TOKEN)
            continue
        if part.get("text"):
            raise RowError(f"{here} is of type {type_} but has a text; make it two parts")
        text += IMAGE_TOKEN
        pictures.append(_part_picture(part, image_keys, here))
    return RowTurn(role, role, text, tuple(pictures))


def _part_picture(part: Mapping[str, Any], image_keys: list[str], where: str) -> RowPicture | int | None:
    """The picture of a part, the index of one of the row's pictures, or None for the next of them."""
    if set(image_keys) == {"bytes", "path"}:
        return parse_picture({"bytes": part["bytes"], "path": part["path"]}, where)
    if len(image_keys) > 1:
        raise RowError(f"{where} has {' and '.join(image_keys)}; keep one of them")
    if not image_keys and part["type"] != "image":
        raise RowError(f"{part['type']} of {where} is an empty path; write the path of a picture")
    if not image_keys:
        number = part.get("index")
        if number is None:
            return None
        if isinstance(number, float) and number.is_integer():  # of a column in which other rows are empty
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool):
            raise RowError(f"index of {where} is {json_type(number)}; it must be the index of a picture, from 0")
        return number
    (key,) = image_keys
    value = part[key]
    if key == "base64":
        return parse_base64_picture(value, f"base64 of {where}")
    if key == "source" and isinstance(value, dict):  # Anthropic's
        if value.get("data"):
            return parse_base64_picture(value["data"], f"data of {where}")
        value = value.get("url")
    if isinstance(value, dict) and "url" in value:
        value = value["url"]
    if value in ("", None):
        raise RowError(f"{key} of {where} is an empty path; write the path of a picture")
    return parse_picture(value, f"{key} of {where}")
