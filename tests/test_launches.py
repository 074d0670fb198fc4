"""A forked process of `launches` is what a real one is, in all that the tests look at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.launches import Forked, run_file, script

TELLS = """
import atexit, os, sys
atexit.register(print, "at the end")
print(sys.argv[1:], os.getcwd(), os.environ["TOLD"], __name__)
print("to the other stream", file=sys.stderr)
{end}
"""
ENDS = {
    "by itself": "",
    "with a status": "sys.exit(3)",
    "with a text": "sys.exit('why')",
    "with an error": "raise KeyError('what')",
    "by a signal": "sys.stdout.flush(); os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_it_has_the_arguments_folder_environment_streams_and_end_of_a_real_one(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tells.py"
    path.write_text(TELLS.format(end=end))
    monkeypatch.chdir(tmp_path)
    told = {"TOLD": "a word"}
    command = [sys.executable, str(path), "one", "two words"]
    real = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, check=False)
    forked = script(path, "one", "two words", environment=told)
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    if "Traceback" in real.stderr:  # which has the frames of runpy too
        assert forked.stderr.startswith("to the other stream\nTraceback (most recent call last):")
        assert forked.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]
    else:
        assert forked.stderr == real.stderr


def test_it_is_heard_while_it_runs_and_can_be_stopped(tmp_path: Path) -> None:
    path = tmp_path / "stays.py"
    path.write_text("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    with Forked(run_file, name=str(path), given=(str(path),)) as process:
        assert process.wait_for("here") == "here\n"
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM
