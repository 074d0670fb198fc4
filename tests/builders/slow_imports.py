"""What `launches.forkserver` holds before it forks: imports that take seconds, and a figure that every run takes."""

from __future__ import annotations

import gc
import importlib

import torch

from mmllm.runs.flops import measure_peak
from tests.builders.launches import SLOW_IMPORTS

gc.disable()
for name in SLOW_IMPORTS:
    importlib.import_module(name)
gc.freeze()  # a collection in a forked process would touch, and so copy, all that was imported
gc.enable()
# One thread, as the runs of the tests have: it is measured once a process, and no thread is left when it is forked.
torch.set_num_threads(1)
measure_peak(torch.device("cpu"), torch.float32, 1)
