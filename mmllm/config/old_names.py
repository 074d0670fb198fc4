"""Names that settings had before, so that old YAML files, overrides and runs that were begun go on working.

The upgrade works on the tree that was read, before pydantic checks it. It knows nothing of what a value means.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from mmllm.config.base import ConfigError

OLD_NAMES = {
    "num_threads": "compute.num_threads",
    "optim.batch_size": "compute.batch_size",
    "optim.accumulate_steps": "compute.accumulate_steps",
    "optim.precision": "compute.precision",
    "optim.gradient_checkpointing": "compute.gradient_checkpointing",
    "optim.compile": "compute.compile",
    "optim.liger": "compute.liger",
    "optim.loss_chunk_tokens": "compute.loss_chunk_tokens",
    "optim.matrix_learning_rate": "optim.muon_learning_rate",
    "optim.rates_of": "optim.learning_rate_overrides",
    "log.validate_every_steps": "validation.every_steps",
    "log.num_samples": "validation.num_samples",
    "log.max_val_examples": "validation.max_examples",
    "log.tasks": "validation.tasks",
    "log.task_questions": "validation.task_questions",
    "log.text_probe": "validation.text_probe",
    "log.max_text_examples": "validation.max_text_examples",
    "log.keep_best": "validation.keep_best",
    "log.min_image_reliance": "alarms.min_image_reliance",
    "log.reliance_after": "alarms.reliance_after",
    "log.reliance_validations": "alarms.reliance_validations",
    "log.forgetting_budget": "alarms.forgetting_budget",
    "log.fail_on_alarm": "alarms.fail",
    "log.tensorboard": "log.trackers",
    "model.vision.fit": "model.vision.image_mode",
    "model.vision.layer": "model.vision.feature_layer",
    "model.vision.fuse_with.layer": "model.vision.fuse_with.feature_layer",
    "model.language.add_tokens": "model.language.extra_special_tokens",
    "language.add_tokens": "language.extra_special_tokens",
}
# Old path -> what its old values are called under the new name. Other values stay as they are.
OLD_VALUES: dict[str, dict[Any, Any]] = {
    "model.vision.fit": {"square": "crop", "tiles": "anyres"},
    "log.tensorboard": {True: ["tensorboard"], False: []},
}

_REFERENCE = re.compile(r"\$\{(\.*)([A-Za-z_][\w.]*)\}")  # OmegaConf's ${optim.batch_size}, or ${.batch_size} beside it


def upgrade(tree: Any, where: str = "these settings") -> tuple[Any, dict[str, str]]:
    """(a copy of a tree of settings with today's names, the old names that stood in it -> the new ones).

    Where the value has another name too, it is listed with it: `model.vision.fit=tiles`.
    Raises ConfigError where both names of one setting are given.
    """
    if not isinstance(tree, dict):
        return tree, {}
    renamed: dict[str, str] = {}
    tree = _copy(tree, "", renamed)
    for old, new in OLD_NAMES.items():
        *sections, key = old.split(".")
        section = _section(tree, sections)
        if section is None or key not in section:
            continue
        *new_sections, new_key = new.split(".")
        target = _section(tree, new_sections, is_made=True)
        if target is None:
            continue  # something that is no section stands there, and is refused later under its own name
        if new_key in target:
            raise ConfigError(f"{where}: {old} and {new} are two names of one setting; leave out {old}, the old name")
        value = section.pop(key)
        target[new_key] = _new_value(old, value)
        if target[new_key] == value:
            renamed[old] = new
        else:
            renamed[f"{old}={value}"] = f"{new}={target[new_key]}"
    return tree, renamed


def print_renamed(renamed: Mapping[str, str]) -> None:
    """One note on stderr, from the first process alone, that lists the old names and the new ones."""
    if renamed and os.environ.get("RANK", "0") == "0":
        names = ", ".join(f"{old} is now {new}" for old, new in renamed.items())
        print(f"note: old names of settings go on working: {names}", file=sys.stderr)


def _new_value(old: str, value: Any) -> Any:
    is_plain = isinstance(value, str | bool)  # 1 == True, but is no switch
    return OLD_VALUES.get(old, {}).get(value, value) if is_plain else value


def _section(tree: Any, names: list[str], *, is_made: bool = False) -> dict[str, Any] | None:
    """The section at this path; None where there is none."""
    for name in names:
        if is_made:
            tree.setdefault(name, {})
        tree = tree.get(name)
        if not isinstance(tree, dict):
            return None
    return tree if isinstance(tree, dict) else None


def _copy(value: Any, path: str, renamed: dict[str, str]) -> Any:
    """The same tree, in which references to settings name today's."""
    if isinstance(value, dict):
        return {key: _copy(item, f"{path}.{key}".lstrip("."), renamed) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item, f"{path}.{index}", renamed) for index, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def reference(match: re.Match[str]) -> str:
        dots, name = match.groups()
        sections = path.split(".")
        target = ".".join([*sections[: max(0, len(sections) - len(dots))], name]) if dots else name
        old = next((name for name in _prefixes(target) if name in OLD_NAMES), None)
        if old is not None:
            renamed[old] = OLD_NAMES[old]
            return f"${{{OLD_NAMES[old]}{target.removeprefix(old)}}}"
        is_moved = dots and any(name in OLD_NAMES for name in _prefixes(path))
        return f"${{{target}}}" if is_moved else match.group()

    return _REFERENCE.sub(reference, value)


def _prefixes(path: str) -> Iterator[str]:
    steps = path.split(".")
    return (".".join(steps[:count]) for count in range(1, len(steps) + 1))
