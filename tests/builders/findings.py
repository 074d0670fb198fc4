"""What `mmllm doctor` finds, as its JSON says it."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from mmllm.cli import app


def examine(*arguments: object) -> tuple[int, dict[tuple[str, str], dict]]:
    """(exit status, findings by area and name)."""
    done = CliRunner().invoke(app, ["doctor", *map(str, arguments), "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, by_name(done.stdout)


def by_name(text: str) -> dict[tuple[str, str], dict]:
    findings = json.loads(text)["findings"]
    return {(f["area"], f["name"]): f for f in findings}


def states(findings: dict[tuple[str, str], dict], area: str) -> dict[str, str]:
    return {name: finding["state"] for (place, name), finding in findings.items() if place == area}
