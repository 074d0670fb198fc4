"""Makes batches of conversations: renders them, packs them into rows, and loads their pictures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmllm.batch import Batch, Example
from mmllm.batching.collate import collate
from mmllm.batching.packed_rows import Packer
from mmllm.chat.renderer import Renderer
from mmllm.feature_cache.cache import FeatureCache
from mmllm.model.processor import VisionLanguageProcessor


class BatchMaker:
    """Makes batches of examples. Pictures come from the feature cache if there is one and `use_features` is set."""

    def __init__(
        self, renderer: Renderer, processor: VisionLanguageProcessor, packer: Packer, features: FeatureCache | None
    ):
        self.renderer, self.processor, self.packer, self.features = renderer, processor, packer, features

    def make(self, examples: Sequence[Example], *, use_features: bool) -> Batch:
        """A batch with the examples in the order of its rows, and the pictures in the order of the examples."""
        rendered = [self.renderer.render_example(example) for example in examples]
        rows = self.packer.rows([len(conversation.input_ids) for conversation in rendered])
        if rows:  # pictures follow their examples
            order = [number for row in rows for number in row]
            examples, rendered = [examples[number] for number in order], [rendered[number] for number in order]
        images = [image for example in examples for image in example.images]
        tensors: dict[str, Tensor] = {}
        if images:
            if self.features is not None and use_features:
                tensors = {"image_features": self.features.get(images)}
            else:
                tensors = self.processor.load_pixels(images)
        return collate(
            rendered,
            pad_token_id=int(self.processor.tokenizer.pad_token_id),
            example_ids=[example.id for example in examples],
            per_row=[len(row) for row in rows] if rows else None,
            **tensors,
        )
