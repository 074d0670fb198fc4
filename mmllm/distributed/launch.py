"""Which strategy the launcher asks for, and the table of strategies."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from mmllm.config import ConfigError
from mmllm.distributed.strategy import Strategy


def _ddp(*given: Any) -> Strategy:
    return Strategy(*given)


def _fsdp2(*given: Any) -> Strategy:
    from mmllm.distributed.strategy_fsdp2 import FSDP2

    return FSDP2(*given)


def _zero(*given: Any) -> Strategy:
    from mmllm.distributed.strategy_zero import ZeRO

    return ZeRO(*given)


STRATEGIES: dict[str, Callable[..., Strategy]] = {"ddp": _ddp, "fsdp2": _fsdp2, "zero": _zero}


def launched_strategy() -> str:
    """The key of STRATEGIES that accelerate's launcher asks for. Raises ConfigError for one that is not here."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "zero"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise ConfigError(f"fsdp_version: {version} of accelerate's config is not supported; set fsdp_version: 2")
        return "fsdp2"
    return "ddp"
