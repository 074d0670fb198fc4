"""Train LLaVA-style vision-language models out of parts you pick, and put them to work.

The names of `__all__` are public: they keep their meaning from one minor version to the next. Everything else may move.
Each is imported when it is first used, so `import mmllm` loads no torch.

    import mmllm

    model = mmllm.load("runs/tiny/stage2")
    reply = model.ask("Describe the picture.", ["data/scenes/val/images/000003.png"])
    print(reply.text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmllm.api import caption, evaluate, load, train
    from mmllm.batch import Example, Message
    from mmllm.chat.conversation import Conversation
    from mmllm.config.file import load_config
    from mmllm.errors import MmllmError
    from mmllm.inference.engine import Engine, Reply
    from mmllm.inference.sampling import Sampling

__version__ = "0.1.0"

__all__ = [
    "Conversation",
    "Engine",
    "Example",
    "Message",
    "MmllmError",
    "Reply",
    "Sampling",
    "__version__",
    "caption",
    "evaluate",
    "load",
    "load_config",
    "train",
]

_HOMES = {
    "Conversation": "mmllm.chat.conversation",
    "Engine": "mmllm.inference.engine",
    "Example": "mmllm.batch",
    "Message": "mmllm.batch",
    "MmllmError": "mmllm.errors",
    "Reply": "mmllm.inference.engine",
    "Sampling": "mmllm.inference.sampling",
    "caption": "mmllm.api",
    "evaluate": "mmllm.api",
    "load": "mmllm.api",
    "load_config": "mmllm.config.file",
    "train": "mmllm.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public are {', '.join(__all__)}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
