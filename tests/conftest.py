"""Settings and fixtures for all tests: offline, no telemetry, and the browser that the page's tests drive."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

# Read when transformers, gradio and tokenizers are imported, so set before any test module is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# the page's fixtures, for every test module
from tests.builders.page_driver import browser, open_page, page, picture, served, slowly  # noqa: F401

# The libraries leave a million objects, among which Python looks for garbage a tenth of the tests' time otherwise.
gc.set_threshold(50_000, 10, 20)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DURATIONS = Path(__file__).with_name("durations.txt")  # seconds and path of each test file, the slowest first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store-durations", action="store_true", help=f"write what each file took to {DURATIONS.name}")


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files run first, so that no process still has one when the others have ended.

    `-m trained` are the tests that need the model of `make demo`; the others can run while it is trained.
    """
    order = {line.split()[1]: number for number, line in enumerate(DURATIONS.read_text().splitlines())}
    items.sort(key=lambda item: order.get(file_of(item.nodeid), len(order)))
    for item in items:
        if "trained_model" in getattr(item, "fixturenames", ()):
            item.add_marker("trained")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("store_durations"):
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[file_of(report.nodeid)] += report.duration
    DURATIONS.write_text("".join(f"{value:.0f} {file}\n" for file, value in seconds.most_common() if value >= 1))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """accelerate keeps one state a process, with the precision of whatever run came first."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


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


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vision/` (open_clip) and `language/` (transformers), small, real and untrained."""
    from tests.builders.tiny import make_parts

    return make_parts(tmp_path_factory.mktemp("tiny") / "parts")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_parts: Path) -> Path:
    """A checkpoint out of `tiny_parts`. Copy it before changing it."""
    from tests.builders.tiny import make_checkpoint

    return make_checkpoint(tiny_parts.parent / "checkpoint", tiny_parts)


@pytest.fixture(scope="session")
def tiny_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes world as `mmllm scenes` writes it: 24 pictures in train, 8 in val."""
    from mmllm.scenes.write import write_scenes

    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, {"train": 24, "val": 8}, 0, num_processes=1)
    return folder


@pytest.fixture(scope="session")
def trained_model() -> Path:
    """The model that `make demo` trains. Without one the test is skipped, or fails with MMLLM_REQUIRE_TRAINED."""
    folder = Path(__file__).resolve().parent.parent / "runs" / "tiny" / "stage2"
    if not (folder / "manifest.json").is_file():
        reason = f"no trained model at {folder}: `make demo` trains it"
        if os.environ.get("MMLLM_REQUIRE_TRAINED"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def tiny_runs(tiny_parts: Path) -> Path:
    """A folder with `stage1.yaml` and `stage2.yaml`: runs of six steps on sixteen conversations in `data/`."""
    from tests.builders.tiny_runs import make_data, write_settings

    folder = tiny_parts.parent / "runs"
    data = make_data(folder / "data")
    write_settings(folder / "stage1.yaml", tiny_parts, data, stage="stage1", train=("projector",))
    write_settings(folder / "stage2.yaml", tiny_parts, data, train=("projector", "language"))
    return folder
