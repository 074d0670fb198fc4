"""How accelerate's launcher asks for each strategy, and what a script under any of them begins with."""

from __future__ import annotations

LAUNCHES: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
HEAD = """
import os, sys, traceback
if "ACCELERATE_USE_DEEPSPEED" in os.environ:
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for half a minute, for inference
"""
