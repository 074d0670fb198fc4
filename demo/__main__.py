"""`python -m demo MODEL [--port N] [--open]`: the chat page of a trained model."""

from __future__ import annotations

import argparse
import importlib.util
import sys

from demo.app import DEFAULT_PORT, launch
from mmllm.errors import EXIT_FAILED, report_errors
from mmllm.paths import expand_path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="demo", description="Chat about pictures with a trained model, in the browser."
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model, such as runs/tiny/stage2")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port of the page; if it is taken, the next free one"
    )
    parser.add_argument("--open", action=argparse.BooleanOptionalAction, default=False, help="open the browser")
    parser.add_argument("--dtype", choices=("stored", "fp32", "bf16", "fp16"), help="the dtype of the weights")
    arguments = parser.parse_args()
    if not 1 <= arguments.port <= 65_535:
        parser.error(f"--port must be 1 to 65535, got {arguments.port}")
    if importlib.util.find_spec("gradio") is None:
        print("error: the page needs gradio; install it with: pip install 'mmllm[demo]'", file=sys.stderr)
        return EXIT_FAILED
    with report_errors():
        launch(expand_path(arguments.model), port=arguments.port, open_browser=arguments.open, dtype=arguments.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
