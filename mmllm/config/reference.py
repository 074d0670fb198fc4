"""What every setting is: its type, its default, whether it may change when a run is resumed, and what it does.

All of it is read from the fields of CONFIGS, so that there is no second list to keep in step.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from mmllm.config import CONFIGS, ConfigError
from mmllm.config.base import Section
from mmllm.config.old_names import OLD_NAMES, OLD_VALUES
from mmllm.paths import expand_path

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}  # names in pydantic's metadata
_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "any value"}


@dataclass(frozen=True)
class Setting:
    """One setting, or one section of them.

    path: dotted, with `[]` after a list of sections: `data.train[].path`.
    default: as YAML writes it, or `required`.
    is_resumable: whether it may change between two starts of one run.
    stages: those that have it, keys of CONFIGS.
    """

    path: str
    type: str
    default: str
    is_resumable: bool
    description: str
    stages: tuple[str, ...]
    is_section: bool


def all_settings() -> list[Setting]:
    """Every setting of every stage, in the order of the sections; one that several stages share is there once."""
    found: dict[tuple[str, str], Setting] = {}
    for stage, model in CONFIGS.items():
        for setting in _walk(model, "", stage, is_resumable=False):
            key = (setting.path, setting.type)
            known = found.get(key)
            found[key] = setting if known is None else replace(known, stages=(*known.stages, stage))
    return list(found.values())


def find_settings(key: str | None = None) -> list[Setting]:
    """The setting of this dotted path, all of a section, or all there are. Raises ConfigError for an unknown one.

    An old name finds the setting that it is called today.
    """
    if key is None:
        return all_settings()
    wanted = OLD_NAMES.get(key, key)
    matching = [one for one in all_settings() if f"{_plain(one.path)}.".startswith(f"{_plain(wanted)}.")]
    if matching:
        return matching
    names = list(dict.fromkeys(_plain(one.path) for one in all_settings()))
    last = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = last or get_close_matches(key, names, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(n for n in names if '.' not in n)}"
    raise ConfigError(f"there is no setting {key!r}; {hint}")


def resumable_paths() -> frozenset[str]:
    """The dotted paths of all settings and sections that carry the mark RESUMABLE."""
    return frozenset(setting.path for setting in all_settings() if setting.is_resumable)


def settings_text(key: str | None = None) -> str:
    """What `mmllm configs show` prints. Raises ConfigError for an unknown key."""
    blocks = []
    if key in OLD_NAMES:
        blocks.append(f"{key} is an old name of {OLD_NAMES[key]}\n")
    for setting in find_settings(key):
        facts = [f"type     {setting.type}", f"default  {setting.default}"]
        if setting.is_section:
            facts = facts[:1] if setting.default == "required" else facts
        facts.append(f"resume   {_resume_text(setting)}")
        if len(setting.stages) < len(CONFIGS):
            facts.append(f"stages   {', '.join(setting.stages)}")
        lines = [setting.path, *(f"  {fact}" for fact in facts), f"  {setting.description}"]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def settings_markdown() -> str:
    """The settings reference as Markdown: a table for each section, and one of old names."""
    groups: dict[str, list[Setting]] = {"": []}
    heads: dict[str, Setting] = {}
    for setting in all_settings():
        if setting.is_section:
            heads.setdefault(setting.path, setting)
            groups.setdefault(setting.path, [])
        parent = setting.path.rpartition(".")[0]
        groups.setdefault(parent, []).append(setting)
    parts = [
        "# Settings\n",
        "Every setting of a config file, by its section. On the command line a setting is written "
        "`section.key=value`. `mmllm configs show KEY` prints the same.\n",
    ]
    for path, settings in groups.items():
        parts.append(f"## `{path}`\n" if path else "## Top level\n")
        if path in heads:
            parts.append(f"{heads[path].description}\n")
        parts.append(_table(("setting", "type", "default", "on resume", "what it does"), map(_row, settings)))
    parts.append("## Old names\n")
    parts.append("These go on working, in files and on the command line; a note says what they are called today.\n")
    rows = [
        (f"`{old}`", f"`{new}`", ", ".join(f"`{a}` is `{_yaml(b)}`" for a, b in OLD_VALUES.get(old, {}).items()))
        for old, new in OLD_NAMES.items()
    ]
    parts.append(_table(("old name", "today", "values"), rows))
    return "\n".join(parts)


def _row(setting: Setting) -> tuple[str, ...]:
    description = setting.description
    if len(setting.stages) < len(CONFIGS):
        description = f"{description} ({', '.join(setting.stages)})"
    name = setting.path.rpartition(".")[2]
    kind = f"[{setting.type}](#{_anchor(setting.path)})" if setting.is_section else setting.type
    return f"`{name}`", kind, f"`{setting.default}`", _resume_text(setting), description


def _anchor(path: str) -> str:
    """Where GitHub and mkdocs put the heading of this section: its letters, digits and underscores."""
    return "".join(letter for letter in path if letter.isalnum() or letter == "_")


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _resume_text(setting: Setting) -> str:
    if setting.is_section and not setting.is_resumable:
        return "see its settings"
    return "may change" if setting.is_resumable else "stays"


def _plain(path: str) -> str:
    """A path without its marks of lists, as somebody may write it."""
    return ".".join(step for step in path.replace("[]", "").split(".") if not step.isdigit())


def _walk(model: type[BaseModel], prefix: str, stage: str, *, is_resumable: bool) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        is_list = section is not None and _holds_list(field.annotation)
        path = f"{prefix}{name}{'[]' if is_list else ''}"
        extra = field.json_schema_extra
        is_free = is_resumable or (isinstance(extra, dict) and bool(extra.get("resumable")))
        yield Setting(
            path, _type_text(field.annotation, tuple(field.metadata)), _default_text(field), is_free,
            " ".join(inspect.cleandoc(field.description or "").split()), (stage,), section is not None,
        )  # fmt: skip
        if section is not None:
            yield from _walk(section, f"{path}.", stage, is_resumable=is_free)


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that this type holds: itself, or one in a list or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_of(inner))), None)


def _holds_list(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, list) or any(
        get_origin(inner) in (tuple, list) for inner in get_args(annotation)
    )


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "its settings' defaults" if isinstance(value, Section) else _yaml(value)


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value or '""'
    if value is None:
        return "none"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _type_text(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type in words, with its bounds: `integer > 0`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        flat = [one for item in more for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _type_text(inner, (*metadata, *flat))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    if any(isinstance(one, AfterValidator) and one.func is expand_path for one in metadata):
        return "path"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_text(one) for one in arguments if one is not type(None)))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (tuple, list):
        items = [_type_text(one) for one in arguments if one is not Ellipsis]
        least = next((f", at least {one.min_length}" for one in metadata if getattr(one, "min_length", None)), "")
        if origin is tuple and Ellipsis not in arguments:
            return f"[{', '.join(items)}]"
        plural = {"section": "sections", "path": "paths"}.get(items[0], items[0].removeprefix("one of "))
        return f"list of {plural}{least}"
    if origin is dict:
        return f"mapping of {_type_text(arguments[0])} to {_type_text(arguments[1])}"
    bounds = [
        f"{sign} {value:g}"
        for one in metadata
        for name, sign in _BOUNDS.items()
        if (value := getattr(one, name, None)) is not None
    ]
    return " ".join([_WORDS[annotation], " and ".join(bounds)]).strip()
