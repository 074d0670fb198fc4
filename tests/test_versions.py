"""The declared versions are true: CI tests the lowest of each, and nothing that is installed is outside them."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PINS = ("requirements.txt", "requirements-oldest.txt")


def declared() -> list[Requirement]:
    """All dependencies of pyproject.toml, those of the extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [Requirement(line) for line in lines]


def key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(file: str) -> dict[str, Version]:
    """What a file of requirements pins for this Python."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    return {key(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


def test_every_lower_bound_is_a_version_that_is_tested() -> None:
    pins = pinned("requirements-oldest.txt")
    wrong = []
    for requirement in declared():
        lowest = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        if lowest != [pins[key(requirement.name)]]:
            wrong.append(f"{requirement}: tested is {pins[key(requirement.name)]}")
    assert not wrong, "set each lower bound to what is tested, or run `make requirements`"


@pytest.mark.parametrize("file", PINS)
def test_what_is_pinned_is_allowed_and_comes_from_no_address(file: str) -> None:
    pins = pinned(file)
    assert all(pins[key(one.name)] in one.specifier for one in declared())
    assert "://" not in (ROOT / file).read_text()


def test_the_environments_of_make_have_what_is_pinned_and_any_other_what_is_declared() -> None:
    """Or the tests of the oldest versions would pass with other ones."""
    file = {".venv": PINS[0], ".venv-oldest": PINS[1]}.get(Path(sys.prefix).name)
    names = {"torch", "torchvision", "transformers", "accelerate", "tokenizers"}
    here = {name: Version(Version(version(name)).public) for name in names}
    assert all(here[key(one.name)] in one.specifier for one in declared() if key(one.name) in names)
    if file:
        assert here == {name: pinned(file)[name] for name in names}
