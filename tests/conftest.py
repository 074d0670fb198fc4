"""Settings and fixtures for all tests: offline, no telemetry, and the browser that the page's tests drive."""

from __future__ import annotations

import os
import shutil

import pytest

# Read when transformers, gradio and tokenizers are imported, so set before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser_path() -> str:
    """The installed Chromium. Without one the test is skipped, or fails where MMLLM_REQUIRE_BROWSER is set."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"no browser: none of {', '.join(BROWSERS)} is on the PATH; install chromium to test the page"
        if os.environ.get("MMLLM_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found
