"""The `mmllm explain` command: prints an explanation to the terminal or as JSON, and writes it as an HTML page."""

from __future__ import annotations

import json
from pathlib import Path

from mmllm.diagnose.explain import explain
from mmllm.diagnose.explain_page import page
from mmllm.diagnose.explain_terminal import show


def run_explain(
    config_path: Path, overrides: list[str], *, sample: str | None, html: Path | None, as_json: bool
) -> None:
    """Prints the explanation, as JSON with `as_json`; writes it to the file `html` too, where one is given."""
    explanation = explain(config_path, overrides, sample=sample)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(explanation), encoding="utf-8")
    if as_json:
        print(json.dumps(explanation.to_json()))
    else:
        show(explanation, html)
