"""Paths as people write them: `~`, `$HOME` and `file://` are expanded, in settings and commands alike.

Everything else stays as it is: names of a hub, URLs such as `s3://`, and Windows' `C:\\DATA~1\\x`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from mmllm.errors import MmllmError

PREFIXES = ("local-dir:", "transformers:")  # of vision towers; a folder or a name of a hub follows
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
_FILE_URL = re.compile(r"file:(?://(?:localhost)?)?(?=/)")


def expand_path(text: str) -> str:
    """The expanded path. Raises MmllmError for a variable that is not set or a home folder that does not exist.

    A path with `~` or `$` that exists literally is not expanded, except where `~` alone is its first part.
    """
    prefix = next((prefix for prefix in PREFIXES if text.startswith(prefix)), "")
    path = text.removeprefix(prefix)
    if scheme := _FILE_URL.match(path):
        path = path[scheme.end() :]
        path = path if Path(path).exists() else unquote(path)
    if path.startswith("~") and (path.split("/")[0] == "~" or not Path(path).exists()):
        try:
            path = str(Path(path).expanduser())
        except RuntimeError as error:
            raise MmllmError(f"{text}: there is no home folder of {path.split('/')[0]}; give the whole path") from error
    if "$" in path and not Path(path).exists():
        path = _VARIABLE.sub(lambda match: _variable_value(match[1] or match[2], text), path)
    return prefix + path


def _variable_value(name: str, text: str) -> str:
    if name not in os.environ:
        raise MmllmError(f"{text}: the environment has no variable {name}; set it, or give the whole path")
    return os.environ[name]
