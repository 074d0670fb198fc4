"""Settings from a file: YAML, at most one `extends`, then `section.key=value` overrides.

OmegaConf merges, pydantic checks. A wrong key, type, range or combination is one ConfigError that names the dotted
path, what was given and what is allowed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from mmllm.config import CONFIGS, ConfigError, RunConfig
from mmllm.config.old_names import print_renamed, upgrade
from mmllm.errors import MmllmError
from mmllm.paths import expand_path

# As shells write variables of the environment; OmegaConf would look for a setting of that name, and all are small.
_ENVIRONMENT = re.compile(r"\$\{([A-Z_][A-Z0-9_]*)\}")

MAX_SHOWN = 200  # characters of a value that is given where another one is allowed


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"no config file at {path}; configs/README.md lists those that come with the project")
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = OmegaConf.load(io.StringIO(_ENVIRONMENT.sub(r"${oc.env:\1}", text)))
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not OmegaConf.is_dict(tree) or not tree:
        raise ConfigError(f"{path} must hold sections with keys, such as `optim:`; got {tree!s:.60}")
    return tree


def _drop_options(base: Any, new: Any) -> None:
    """A part of another `kind` does not keep the options of the one that it replaces."""
    for key in new:
        if key not in base or OmegaConf.is_interpolation(base, key) or OmegaConf.is_interpolation(new, key):
            continue
        old, fresh = base[key], new[key]
        if OmegaConf.is_dict(old) and OmegaConf.is_dict(fresh):
            if "kind" in fresh and fresh["kind"] != old.get("kind"):
                old.pop("options", None)
            _drop_options(old, fresh)


def _merge(base: Any, new: Any) -> Any:
    _drop_options(base, new)
    return OmegaConf.merge(base, new)


def _problem(error: Any, tree: Any) -> str:
    path = ".".join(str(step) for step in error["loc"])
    allowed = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        parent: Any = tree
        return f"{path}: unknown key (given: {_shown(error['input'])}){_near(error['loc'], parent)}"
    if error["type"] == "missing":
        return f"{path}: missing, and it has no default"
    given = "" if isinstance(error["input"], dict | BaseModel) else f" (given: {_shown(error['input'])})"
    return f"{path or 'config'}: {allowed}{given}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text):,} characters)"


def _near(location: tuple[Any, ...], tree: Any) -> str:
    """The keys that are allowed where this one stands."""
    model: Any = CONFIGS[tree["stage"]]
    for step in location[:-1]:
        if isinstance(step, int):
            continue
        annotation = model.model_fields[step].annotation if step in getattr(model, "model_fields", {}) else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if model is None:
            return ""
    return f"; allowed: {', '.join(model.model_fields)}"


def _config_path(text: str) -> Path:
    try:
        return Path(expand_path(text))
    except MmllmError as error:
        raise ConfigError(str(error)) from error


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked settings of a YAML file with `section.key=value` overrides.

    Raises ConfigError (a MmllmError) for a wrong key, type, range or combination: it names the setting, what was given
    and what is allowed.

    Example:
        import mmllm

        config = mmllm.load_config("configs/tiny/stage1.yaml", ["optim.max_steps=10"])
        print(config.optim.max_steps, config.out)
    """
    path = _config_path(str(path))
    tree, renamed = _upgraded(path, _read(path))
    if parent := tree.pop("extends", None):
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: extends must name one file, got {parent!r}")
        base_path = path.parent / _config_path(parent)
        base, renamed_there = _upgraded(base_path, _read(base_path))
        renamed = renamed_there | renamed
        if "extends" in base:
            raise ConfigError(f"{path} extends {parent}, which extends another file; one level is allowed")
        tree = _merge(base, tree)
    return _checked(path, tree, overrides or [], renamed)


def with_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """These settings with `section.key=value` overrides, checked as those of a file are. Raises ConfigError."""
    return _checked("config", OmegaConf.create(config.model_dump(mode="json")), overrides)


def saved_settings(text: str) -> Any:
    """Settings that a run dumped, by `dump_config`, with today's names; nothing is checked and no note printed."""
    tree, _ = upgrade(OmegaConf.to_container(OmegaConf.create(text)), "the saved settings")
    return tree


def _upgraded(where: str | Path, tree: Any) -> tuple[Any, dict[str, str]]:
    """The tree with today's names of settings, and which old ones stood in it. Raises ConfigError."""
    container, renamed = upgrade(OmegaConf.to_container(tree, resolve=False), str(where))
    return (OmegaConf.create(container) if renamed else tree), renamed


def _overrides_tree(tree: Any, overrides: list[str]) -> Any:
    """The tree that `section.key=value` overrides make. Raises ConfigError for one that cannot be read."""
    given: Any = OmegaConf.create()
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        try:
            written = _ENVIRONMENT.sub(r"${oc.env:\1}", override)
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([written]))
            OmegaConf.merge(tree, given)
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            raise ConfigError(f"override {override!r} cannot be read: {error}") from error
    return given


def _checked(path: str | Path, tree: Any, overrides: list[str], renamed: Mapping[str, str] | None = None) -> RunConfig:
    """The checked settings of an upgraded tree; prints one note about `renamed` and about the overrides."""
    given, renamed_here = _upgraded("the overrides", _overrides_tree(tree, overrides))
    try:
        values = OmegaConf.to_container(_merge(tree, given), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    assert isinstance(values, dict)
    if _is_saved_by_a_run(path, values.get("out")):
        renamed = {}  # no hand wrote it, and the run that goes on writes it anew
    print_renamed({**(renamed or {}), **renamed_here})
    stage = values.get("stage")
    if stage not in CONFIGS:
        what = "missing" if stage is None else f"{stage!r} is not known"
        raise ConfigError(f"{path} cannot be used:\n  stage: {what}; allowed: {', '.join(CONFIGS)}")
    try:
        return CONFIGS[stage].model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_problem(row, values)}" for row in error.errors())
        raise ConfigError(f"{path} cannot be used:\n{problems}") from error


def _is_saved_by_a_run(path: str | Path, out: Any) -> bool:
    """Whether this is the file that a run left in its own folder, `out`."""
    return isinstance(out, str) and Path(path).absolute() == (Path(out) / "config.yaml").absolute()


def dump_config(config: RunConfig) -> str:
    """The resolved settings as YAML that runs the same run again."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
