"""The config of a model, in plain values: what `config.json` of a checkpoint holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig


class VisionLanguageConfig(PretrainedConfig):  # type: ignore[misc]
    """The parts of a model in plain values: enough to build it without the files of any part.

    Args:
        vision: a `TowerSpec` as a dict.
        projector: `kind` and `options` of one of PROJECTORS.
        text_config: the LLM's own transformers config.
        image_token_id: the id of `<image>` in the vocabulary.
        num_image_tokens: image tokens per view of the tower, counted by running tower and projector once.
        layout: of `Layout.to_json`: how an image becomes views; None: each is one square view.
        part_dtypes: the dtype of the weights of each of PARTS, such as "bfloat16"; None: all parts have the same.
            A model loaded in a dtype other than its LLM's has all parts in that dtype.
    """

    model_type = "mmllm"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        projector: dict[str, Any] | None = None,
        text_config: Any = None,
        image_token_id: int = 0,
        num_image_tokens: int = 0,
        layout: dict[str, Any] | None = None,
        part_dtypes: dict[str, str] | None = None,
        **kwargs: Any,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.vision = vision
        self.projector = projector
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.layout = layout
        self.part_dtypes = part_dtypes
        if text_config is not None:
            kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    def dtype_of(self, part: str) -> torch.dtype:
        """The dtype to build a part in: its saved one, or the one in which the whole model is loaded."""
        saved_dtypes = self.part_dtypes
        if saved_dtypes is None or str(self.dtype).removeprefix("torch.") != saved_dtypes["language"]:
            return torch.get_default_dtype()
        dtype: torch.dtype = getattr(torch, saved_dtypes[part])
        return dtype


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Creates new tensors in this dtype inside the `with` block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AutoConfig.register(VisionLanguageConfig.model_type, VisionLanguageConfig, exist_ok=True)
