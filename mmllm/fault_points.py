"""Named moments at which a test kills the process, to prove that whatever is on the disk then is enough to go on."""

from __future__ import annotations

import os
import signal

KILL_AT = "MMLLM_KILL_AT"


def fault_point(point: str) -> None:
    """Kills this process by SIGKILL where the environment's MMLLM_KILL_AT is this point; otherwise does nothing.

    Args:
        point: what it happens to and what comes next, as in "step_0000004: before rename".
    """
    if os.environ.get(KILL_AT) == point:
        os.kill(os.getpid(), signal.SIGKILL)
