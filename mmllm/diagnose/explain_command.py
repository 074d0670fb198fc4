"""The `mmllm explain` command: an explained example in the terminal, as JSON, and as a page."""

from __future__ import annotations

import json
from pathlib import Path

from mmllm.diagnose.explain import explain
from mmllm.diagnose.explain_page import page
from mmllm.diagnose.explain_terminal import show


def run_explain(
    config_path: Path, overrides: list[str], *, sample: str | None, html: Path | None, as_json: bool
) -> None:
    """Prints the explanation, or the same as JSON, and writes it as a page where `html` names one."""
    found = explain(config_path, overrides, sample=sample)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(found), encoding="utf-8")
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        show(found, html)
