"""The command line as a whole: its commands, its groups, and how it starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmllm.cli import app

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train", "report", "plan", "check", "explain", "chat", "caption", "demo", "eval", "merge", "import", "export",
    "scenes", "doctor", "configs",
}  # fmt: skip
HEAVY = {"torch", "transformers", "open_clip", "accelerate", "datasets", "gradio", "peft", "matplotlib"}


def loaded(code: str) -> set[str]:
    """The top packages that a process has loaded after this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, file=sys.stderr)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name.split(".")[0] for name in done.stderr.split()}


def test_all_commands_are_there_at_the_top() -> None:
    done = CliRunner().invoke(app, ["--help"])
    assert done.exit_code == 0
    words = {line.strip("│ ").split(" ")[0] for line in done.output.splitlines() if line.startswith("│")}
    assert words >= COMMANDS
    for name in COMMANDS:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name
    for group, name in (("export", "hf"), ("configs", "show"), ("configs", "copy")):
        assert CliRunner().invoke(app, [group, name, "--help"]).exit_code == 0


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["configs"], ["configs", "show", "optim"]])
def test_help_and_settings_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"from mmllm.cli import app\napp({arguments!r}, standalone_mode=False)"
    assert not loaded(code) & HEAVY


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmllm.cli", "configs", "show", "seed"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("seed\n  type     integer >= 0\n  default  0\n  resume   stays\n")


def test_debug_shows_the_traceback_and_the_next_command_does_not() -> None:
    debugged = CliRunner().invoke(app, ["--debug", "configs", "show", "nothing.here"])
    assert type(debugged.exception).__name__ == "ConfigError"
    plain = CliRunner().invoke(app, ["configs", "show", "nothing.here"])
    assert isinstance(plain.exception, SystemExit)
    assert plain.stderr.startswith("error: there is no setting 'nothing.here'")
