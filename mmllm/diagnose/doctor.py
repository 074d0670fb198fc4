"""`mmllm doctor`: what is installed, what works here, what is missing and why. Imports nothing that may be missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmllm.diagnose.checkpoint_findings import examine_checkpoint
from mmllm.diagnose.finding import Finding
from mmllm.diagnose.machine_findings import examine_machine

TABLE_WIDTH = 140  # in characters, where the output is not a terminal


def examine(model: Path | None, *, as_json: bool) -> bool:
    """Prints findings on this machine, and on a checkpoint where one is given; False where something is broken."""
    findings = list(examine_machine())
    if model is not None:
        findings += examine_checkpoint(model)
    works = not any(finding.state == "broken" for finding in findings)
    if as_json:
        print(json.dumps({"works": works, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(findings, works)
    return works


def _print(findings: Sequence[Finding], works: bool) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    styles = {"ok": "green", "note": "yellow", "broken": "bold red"}
    table = Table("", "", "", Column(overflow="fold"), show_header=False)
    area = ""
    for finding in findings:
        if finding.area != area:
            table.add_section()
        shown = finding.area if finding.area != area else ""
        area = finding.area
        table.add_row(shown, finding.name, Text(finding.state, styles[finding.state]), finding.text)
    console.print(table)
    console.print("all that is needed works" if works else "something that is needed is broken")
