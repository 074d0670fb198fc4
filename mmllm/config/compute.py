"""How a run computes: batches, precision, and what trades time for memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from mmllm.config.base import RESUMABLE, PositiveInt, Precision, Section


def _parts_to_recompute(value: Any) -> Any:
    """`true` is the LLM, which has nearly all the memory."""
    return {True: ("language",), False: ()}[value] if isinstance(value, bool) else value


class ComputeConfig(Section):
    """How a step is computed.

    The global batch is processes x `batch_size` x `accumulate_steps`. It must stay the same when a run is resumed, but
    how it is divided may change.
    """

    batch_size: Annotated[PositiveInt, RESUMABLE]
    """Examples of one process in one micro-step."""
    accumulate_steps: Annotated[PositiveInt, RESUMABLE] = 1
    """Micro-steps of one optimizer step. Gradients add up over them, so memory is that of one."""
    precision: Precision = "fp32"
    """What is computed in. `auto` is bf16 where the device has instructions for it, and fp32 elsewhere. Trained weights
    and their optimizer state are fp32 in any case. A resumed run keeps what it began with."""
    gradient_checkpointing: Annotated[
        tuple[Literal["language", "vision"], ...], BeforeValidator(_parts_to_recompute), RESUMABLE
    ] = ()
    """Parts whose layers are computed again in the backward pass: less memory, more time. `true` is `[language]`. The
    tower only where it is trained and has no batch norm."""
    compile: Annotated[bool, RESUMABLE] = False
    """Compile the LLM's layers with torch.compile. Needs a C++ compiler; the first steps wait for it."""
    liger: bool = False
    """Use Liger's kernels in the LLM. Needs the package liger-kernel and a CUDA GPU."""
    loss_chunk_tokens: Annotated[PositiveInt | None, RESUMABLE] = None
    """Rows of logits that are held in memory at once. Default: 64 million logits, at least 512 rows."""
    num_threads: Annotated[PositiveInt | None, RESUMABLE] = None
    """CPU threads of one process. Default: torch's own number, at most the cores that the process may use."""
