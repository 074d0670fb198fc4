"""What `launches.forkserver` holds before it forks: imports that take seconds, and a figure that every run takes."""

from __future__ import annotations

import accelerate
import deepspeed
import matplotlib.figure
import mmllm.captioning.caption
import open_clip
import peft
import torch

import mmllm.evaluation.validation_tasks
import mmllm.inference.terminal_chat
import mmllm.stages.conversation
import mmllm.stages.plan
import mmllm.stages.registry
import mmllm.training.features
import mmllm.training.loop
import mmllm.training.lora
from mmllm.runs.flops import measure_peak

__all__ = ["accelerate", "deepspeed", "matplotlib", "mmllm", "open_clip", "peft"]

# One thread, as the runs of the tests have: it is measured once a process, and no thread is left when it is forked.
torch.set_num_threads(1)
measure_peak(torch.device("cpu"), torch.float32, 1)
