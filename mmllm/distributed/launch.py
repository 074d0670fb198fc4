"""The table of strategies, and which of them accelerate's launcher selects."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from mmllm.config import ConfigError
from mmllm.distributed.strategy import Strategy


def _ddp(*arguments: Any) -> Strategy:
    return Strategy(*arguments)


def _fsdp2(*arguments: Any) -> Strategy:
    from mmllm.distributed.strategy_fsdp2 import FSDP2

    return FSDP2(*arguments)


def _zero(*arguments: Any) -> Strategy:
    from mmllm.distributed.strategy_zero import ZeRO

    return ZeRO(*arguments)


STRATEGIES: dict[str, Callable[..., Strategy]] = {"ddp": _ddp, "fsdp2": _fsdp2, "zero": _zero}


def launched_strategy() -> str:
    """The key of STRATEGIES that accelerate's launcher selects. Raises ConfigError for FSDP versions other than 2."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "zero"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
            raise ConfigError(f"fsdp_version: {version} of accelerate's config is not supported; set fsdp_version: 2")
        return "fsdp2"
    return "ddp"
