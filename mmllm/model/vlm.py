"""The model: image -> vision tower -> projector -> LLM. Read this file first.

Shapes: `B` batch, `T` tokens, `N` images of the whole batch, `P` patches and `M` tokens per image, `Dv` vision width,
`D` LLM width, `V` vocabulary. The text holds the image token `M` times for each image; the projected patches
replace those tokens, in the order of the images. Where images are cut into tiles or keep their aspect ratio, `M`
depends on the image: see image_tokens.py. Generation is in generation.py, the config in model_config.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmllm.batch import Batch
from mmllm.kernels.attention import replace_capped_sdpa
from mmllm.kernels.tables import compute_tables
from mmllm.model.generation import ImageGenerationMixin
from mmllm.model.image_tokens import build_layout
from mmllm.model.model_config import VisionLanguageConfig, default_dtype
from mmllm.model.tower import TowerSpec, VisionTower
from mmllm.model.vision import build_tower
from projector import Projector, build_projector

PARTS = {"vision": "vision_tower", "projector": "projector", "language": "language_model"}


class VisionLanguageModel(PreTrainedModel, ImageGenerationMixin):  # type: ignore[misc]
    """LLaVA's architecture with any tower, projector and LLM. Paper: https://arxiv.org/abs/2304.08485"""

    config_class = VisionLanguageConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VisionLanguageConfig):
        super().__init__(config)
        self.vision_tower = _build_tower(config)
        self.projector = _build_projector(config, self.vision_tower.width)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        replace_capped_sdpa(self.language_model)
        self.layout = build_layout(config.num_image_tokens, config.layout)
        self.image_newline: nn.Parameter | None = None  # [D], at the end of each row of image tokens
        if self.layout.has_newline:
            width = config.text_config.hidden_size
            newline = torch.randn(width, dtype=config.dtype_of("projector")) / width**0.5  # LlavaNext's initial scale
            self.image_newline = nn.Parameter(newline)
        self.language_inputs = frozenset(inspect.signature(self.language_model.forward).parameters)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] of the LLM, and the mean loss where `labels` are given. `kwargs` go to the LLM.

        So do `position_ids`, except to a state-space LLM, which takes none. With `logits_to_keep` the head runs on that
        many last tokens only: of a long prompt `generate` reads just the last row. Raises ValueError unless exactly one
        of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            if image_features is None and pixel_values is not None:
                image_features = self.encode_images(pixel_values, image_sizes)
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, image_features, image_sizes)
        if "position_ids" in self.language_inputs:
            kwargs["position_ids"] = position_ids
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "labels": labels, **kwargs}
        if not logits_to_keep:
            return self.language_model(**inputs)
        if "logits_to_keep" in self.language_inputs:
            return self.language_model(logits_to_keep=logits_to_keep, **inputs)
        with self.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][:, -logits_to_keep:],)):
            return self.language_model(**inputs)

    def encode_images(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Patch tokens of the vision tower, without gradient where it is frozen: [N, C, H, W] -> [N, P, Dv].

        Layouts other than `single` have other shapes, see image_tokens.py.
        """
        dtype = next((weight.dtype for weight in self.vision_tower.parameters()), pixel_values.dtype)
        with self._tower_gradients():
            return self.layout.encode(self.vision_tower, pixel_values.to(dtype), self.layout.shapes(image_sizes))

    def _tower_gradients(self) -> torch.set_grad_enabled:
        is_trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        return torch.set_grad_enabled(torch.is_grad_enabled() and is_trained)

    def project_images(self, image_features: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Image tokens of all pictures, concatenated: [N, P, Dv] -> [N * M, D], in the projector's dtype."""
        if not torch.is_autocast_enabled(image_features.device.type):  # autocast casts by itself
            image_features = image_features.to(next(self.projector.parameters()).dtype)
        return self.layout.project(self.projector, image_features, self.layout.shapes(image_sizes), self.image_newline)

    def embed(self, input_ids: Tensor, image_features: Tensor | None, image_sizes: Tensor | None = None) -> Tensor:
        """Token embeddings with projected patches in the image slots: [B, T], [N, P, Dv] -> [B, T, D].

        Raises ValueError where the numbers of slots and image tokens differ.
        """
        if image_features is None:
            if (num_slots := int((input_ids == self.config.image_token_id).sum())) > 0:
                raise ValueError(f"{num_slots} image slots in the text but no image was given")
            embeds: Tensor = self.get_input_embeddings()(input_ids)
            return embeds
        image_embeds = self.project_images(image_features, image_sizes)
        images = f"{len(image_features)} images of {self.config.num_image_tokens}"
        if image_sizes is not None:
            images = f"{len(image_sizes)} images, {self.layout.kind}"
        return self.fill_slots(input_ids, image_embeds, images)

    def fill_slots(self, input_ids: Tensor, image_embeds: Tensor, images: str = "projected before") -> Tensor:
        """Token embeddings with these image tokens in the image slots: [B, T], [slots, D] -> [B, T, D].

        Raises ValueError, which says what the `images` are, where the numbers of slots and image tokens differ.
        """
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        slots = (input_ids == self.config.image_token_id).to(embeds.device)  # [B, T]
        if (num_slots := int(slots.sum())) != len(image_embeds):
            raise ValueError(
                f"{num_slots} image slots in the text but {len(image_embeds)} image tokens ({images}); each image "
                "needs one slot per token"
            )
        if num_slots == 0:  # no images: keep the projector in the graph, for ranks that wait for its gradient
            return embeds + 0.0 * image_embeds.sum()
        filled: Tensor = embeds.masked_scatter(slots.unsqueeze(-1), image_embeds.to(embeds))
        return filled

    def embed_batch(self, batch: Batch, *, always_runs_tower: bool = False) -> Tensor:
        """`embed` for a training batch: [B, T, D]. Without images the projector still runs, on zero images.

        A trained tower then runs on one blank picture whose output is dropped (most encoders reject zero pictures),
        because all ranks wait for the gradient of each part. A frozen tower runs only with `always_runs_tower`, for
        ranks that wait for its weights.
        """
        features, sizes = batch.image_features, batch.image_sizes
        if features is None and batch.pixel_values is not None:
            features = self.encode_images(batch.pixel_values, sizes)
        if features is None:
            tower, sizes = self.vision_tower, batch.input_ids.new_zeros(0, 2)
            features = torch.zeros(0, tower.num_patches, tower.width, device=batch.input_ids.device)
            dtype = next((weight.dtype for weight in tower.parameters()), features.dtype)
            with self._tower_gradients():
                if torch.is_grad_enabled() or always_runs_tower:
                    side = tower.spec.image_size_px
                    features = tower(features.new_zeros(1, 3, side, side, dtype=dtype))[:0]
        return self.embed(batch.input_ids, features, sizes)

    @classmethod
    def assemble(
        cls,
        config: VisionLanguageConfig,
        tower: VisionTower,
        projector: Projector,
        language_model: Any,
        *,
        image_newline: Tensor | None = None,
    ) -> VisionLanguageModel:
        """A model around loaded parts; nothing is built, or held in memory, twice.

        `image_newline` [D] is initialized where the layout needs one and none is given.
        """
        with torch.device("meta"):
            model = cls(config)
        model.vision_tower, model.projector, model.language_model = tower, projector, language_model
        if model.image_newline is not None:
            width = config.text_config.hidden_size
            values = torch.randn(width) / width**0.5 if image_newline is None else image_newline.detach()
            model.image_newline = nn.Parameter(values.to(next(projector.parameters()).dtype))
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; then computes the tables of tower and projector, which it leaves uninitialized."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        compute_tables(model.vision_tower, lambda: _build_tower(model.config))
        compute_tables(model.projector, lambda: _build_projector(model.config, model.vision_tower.width))
        return loaded

    def _init_weights(self, module: Any) -> None:
        """Each part brings its own initialization; the LLM's tables are computed by its own `_init_weights`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the LLM, and so of KV caches; tower and projector may be held in others."""
        dtype: torch.dtype = self.get_input_embeddings().weight.dtype
        return dtype

    def part_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which each of PARTS is held now."""
        weights = {part: next(self.get_submodule(name).parameters(), None) for part, name in PARTS.items()}
        dtypes = {part: torch.float32 if weight is None else weight.dtype for part, weight in weights.items()}
        return {**dtypes, "language": self.dtype}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' own, with the dtype of each part in the config, so that loading restores it."""
        self.config.part_dtypes = {
            part: str(dtype).removeprefix("torch.") for part, dtype in self.part_dtypes().items()
        }
        super().save_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> Any:
        return self.language_model.get_decoder()


def _build_tower(config: VisionLanguageConfig) -> VisionTower:
    assert config.vision is not None
    with default_dtype(config.dtype_of("vision")):
        return build_tower(TowerSpec.from_json(config.vision))


def _build_projector(config: VisionLanguageConfig, vision_dim: int) -> Projector:
    assert config.projector is not None
    kind, options = config.projector["kind"], config.projector["options"]
    with default_dtype(config.dtype_of("projector")):
        return build_projector(kind, vision_dim=vision_dim, llm_dim=config.text_config.hidden_size, **options)


AutoModelForImageTextToText.register(VisionLanguageConfig, VisionLanguageModel, exist_ok=True)
