"""The pages of the site that are made when it is built: settings and Python from the code, others from the checkout.

A hook of MkDocs, https://www.mkdocs.org/user-guide/configuration/#hooks
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import mmllm
from mmllm.compatibility import matrix_markdown
from mmllm.config.reference import settings_markdown

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^(Args|Returns|Raises|Example):$")
ARGUMENT = re.compile(r"^    (\w+): ")


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    pages = {
        "settings": settings_markdown(),
        "compatibility": matrix_markdown(),
        "python": python_page(),
        "configs": (ROOT / "configs" / "README.md").read_text(encoding="utf-8"),
        "changelog": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }
    for name, text in pages.items():
        text = text.replace("](../docs/", "](../")  # of configs/README.md
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def python_page() -> str:
    """The public names, from their docstrings."""
    parts = ["# Python", (inspect.getdoc(mmllm) or "").replace("`__all__`", "this page")]
    for name in sorted(
        {*mmllm.__all__} - {"__version__"}, key=lambda name: (inspect.isclass(getattr(mmllm, name)), name)
    ):
        value = getattr(mmllm, name)
        kind = "class " if inspect.isclass(value) else ""
        parts += [f"## mmllm.{name}", _code(f"{kind}{name}{_signature(value)}"), _prose(inspect.getdoc(value) or "")]
        if inspect.isclass(value):
            parts += _members(value)
    return "\n\n".join(parts) + "\n"


def _members(value: type) -> list[str]:
    """Public methods and properties that the class itself has, with their docstrings."""
    parts = []
    for name, member in vars(value).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        call = "" if isinstance(member, property) else _signature(function)
        parts += [f"### {value.__name__}.{name}", _code(f"{name}{call}"), _prose(inspect.getdoc(function) or "")]
    return parts


def _signature(value: Any) -> str:
    """`(name: type = default, ...)`, one parameter a line where it is long."""
    if _is_error(value):
        return "(message)"
    signature = inspect.signature(value)
    words: list[str] = []
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        default = "..." if repr(parameter.default) == "<factory>" else repr(parameter.default)
        typed = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        words.append(name + typed + ("" if parameter.default is parameter.empty else f" = {default}"))
    returns = (
        "" if signature.return_annotation in (signature.empty, None, "None") else f" -> {signature.return_annotation}"
    )
    words = [word for word in words if word != "self"]
    flat = f"({', '.join(words)}){returns}"
    return flat if len(flat) <= 80 else "(\n" + "".join(f"    {word},\n" for word in words) + f"){returns}"


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _prose(docstring: str) -> str:
    """A docstring as Markdown: its blocks become headings, arguments a list, the example code."""
    lines: list[str] = []
    block = ""
    for line in docstring.splitlines():
        if found := BLOCK.match(line):
            lines += [*(["```"] if block == "Example" else []), f"**{found[1]}**", ""]
            block = found[1]
            lines += ["```python"] if block == "Example" else []
        elif block in ("Args", "Raises") and (found := ARGUMENT.match(line)):
            lines.append(f"- `{found[1]}`: {line[found.end() :]}")
        else:
            indent = {"Example": "    ", "Returns": "    ", "Args": "      ", "Raises": "      "}.get(block, "")
            lines.append(line.removeprefix(indent))
    return "\n".join([*lines, *(["```"] if block == "Example" else [])])
