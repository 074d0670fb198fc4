"""The model: image -> vision tower -> projector -> LLM. Read this file first.

Shapes: `B` batch, `T` tokens, `N` images of the whole batch, `P` patches and `M` tokens per image, `Dv` vision width,
`D` LLM width, `V` vocabulary. The image token stands `M` times in the text for each image; the projected patches
take the places of those tokens, in the order in which the images stand. Where images are cut into tiles or keep their
aspect ratio, `M` depends on the image: mmllm/model/layout.py says how.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmllm.batch import Batch
from mmllm.kernels.attention import keep_score_cap
from mmllm.kernels.tables import compute_tables
from mmllm.model.layout import build_layout
from mmllm.model.tower import TowerSpec, VisionTower
from mmllm.model.vision import build_tower
from projector import Projector, build_projector

PARTS = {"vision": "vision_tower", "projector": "projector", "language": "language_model"}
_OF_IMAGES = ("pixel_values", "image_features", "image_sizes")
_CACHES = ("cache", "past_key_values", "cache_params")  # from transformers 5.24 on, and before it


class VisionLanguageConfig(PretrainedConfig):  # type: ignore[misc]
    """What a model is made of, in plain values: enough to build it without any part's own files.

    Args:
        vision: a `TowerSpec` as a dict.
        projector: `kind` and `options` of one of PROJECTORS.
        text_config: the LLM's own transformers config.
        image_token_id: the vocabulary's `<image>`.
        num_image_tokens: how many of them stand for one view of the tower, counted by probing tower and projector.
        layout: how an image becomes several views, or one of another shape; None: each is one view.
        part_dtypes: of each of PARTS the dtype of its weights, such as "bfloat16". A model that is read in another
            dtype than its LLM's has all parts in that one; None: all parts have the same.
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
        """The dtype to build a part in: its own, or the one that all parts are asked for in."""
        own = self.part_dtypes
        if own is None or str(self.dtype).removeprefix("torch.") != own["language"]:
            return torch.get_default_dtype()
        dtype: torch.dtype = getattr(torch, own[part])
        return dtype


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class VisionLanguageModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """LLaVA's architecture with parts of one's choice. Paper: https://arxiv.org/abs/2304.08485"""

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
        keep_score_cap(self.language_model)
        self.layout = build_layout(config.num_image_tokens, config.layout)
        self.image_newline: nn.Parameter | None = None  # [D], at the end of each row of image tokens
        if self.layout.has_newline:
            width = config.text_config.hidden_size
            newline = torch.randn(width, dtype=config.dtype_of("projector")) / width**0.5  # LlavaNext's size at first
            self.image_newline = nn.Parameter(newline)
        self.language_inputs = frozenset(inspect.signature(self.language_model.forward).parameters)
        self.post_init()

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
        """A model around parts that are loaded already; nothing is built, or held in memory, twice.

        `image_newline` [D] is fresh where the layout needs one and none is given.
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
        """transformers' own, and the tables of tower and projector, which it leaves uninitialised."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        compute_tables(model.vision_tower, lambda: _build_tower(model.config))
        compute_tables(model.projector, lambda: _build_projector(model.config, model.vision_tower.width))
        return loaded

    def _init_weights(self, module: Any) -> None:
        """Each part brings its own initialisation; the LLM's tables are computed by its own `_init_weights`."""

    @property
    def dtype(self) -> torch.dtype:
        """That of the LLM, in which caches are made; tower and projector may be held in others."""
        dtype: torch.dtype = self.get_input_embeddings().weight.dtype
        return dtype

    def part_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which each of PARTS is held now."""
        held = {part: next(self.get_submodule(name).parameters(), None) for part, name in PARTS.items()}
        found = {part: torch.float32 if one is None else one.dtype for part, one in held.items()}
        return {**found, "language": self.dtype}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, with the dtype of each part in the config, so that each is read as it was saved."""
        self.config.part_dtypes = {part: str(one).removeprefix("torch.") for part, one in self.part_dtypes().items()}
        super().save_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> Any:
        return self.language_model.get_decoder()

    def encode_images(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Patch tokens of the vision tower, without gradient where it is frozen: [N, C, H, W] -> [N, P, Dv].

        Shapes are other ones where the layout of the images says so.
        """
        dtype = next((one.dtype for one in self.vision_tower.parameters()), pixel_values.dtype)  # raw patches have none
        with self._tower_gradients():
            return self.layout.encode(self.vision_tower, pixel_values.to(dtype), self._shapes(image_sizes))

    def _tower_gradients(self) -> torch.set_grad_enabled:
        is_trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        return torch.set_grad_enabled(torch.is_grad_enabled() and is_trained)

    def _shapes(self, image_sizes: Tensor | None) -> list[tuple[int, int]]:
        if image_sizes is None and self.layout.has_newline:
            raise ValueError(f"pictures laid out as {self.layout.kind} need image_sizes beside pixel_values")
        return [] if image_sizes is None else [(int(one), int(two)) for one, two in image_sizes.tolist()]

    def project_images(self, image_features: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Image tokens of all pictures, one after the other: [N, P, Dv] -> [N * M, D], in the projector's dtype."""
        if not torch.is_autocast_enabled(image_features.device.type):  # which casts by itself
            image_features = image_features.to(next(self.projector.parameters()).dtype)
        return self.layout.project(self.projector, image_features, self._shapes(image_sizes), self.image_newline)

    def embed(self, input_ids: Tensor, image_features: Tensor | None, image_sizes: Tensor | None = None) -> Tensor:
        """Token embeddings with projected patches in the image slots: [B, T], [N, P, Dv] -> [B, T, D].

        Raises ValueError where slots and image tokens do not agree in number.
        """
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        slots = (input_ids == self.config.image_token_id).to(embeds.device)  # [B, T]
        if image_features is None:
            if (found := int(slots.sum())) > 0:
                raise ValueError(f"{found} image slots in the text but no image was given")
            return embeds
        image_embeds = self.project_images(image_features, image_sizes)
        if (found := int(slots.sum())) != len(image_embeds):
            images = f"{len(image_features)} images of {self.config.num_image_tokens}"
            if image_sizes is not None:
                images = f"{len(image_sizes)} images, {self.layout.kind}"
            raise ValueError(
                f"{found} image slots in the text but {len(image_embeds)} image tokens ({images}); each image needs "
                "its slots"
            )
        if found == 0:  # a batch without images: keep the projector in the graph, for ranks that wait for its gradient
            return embeds + 0.0 * image_embeds.sum()
        filled: Tensor = embeds.masked_scatter(slots.unsqueeze(-1), image_embeds.to(embeds))
        return filled

    def embed_batch(self, batch: Batch, *, always_runs_tower: bool = False) -> Tensor:
        """`embed` for a training batch; one without images still runs the projector, on none.

        And a tower that is trained, on a blank picture that goes nowhere (most encoders do not take none): all ranks
        wait for the gradient of each part, whether they have images or not. A frozen tower does not run, unless
        `always_runs_tower`, for ranks that wait for its weights.
        """
        features, sizes = batch.image_features, batch.image_sizes
        if features is None and batch.pixel_values is not None:
            features = self.encode_images(batch.pixel_values, sizes)
        if features is None:
            tower, sizes = self.vision_tower, batch.input_ids.new_zeros(0, 2)
            features = torch.zeros(0, tower.num_patches, tower.width, device=batch.input_ids.device)
            dtype = next((one.dtype for one in tower.parameters()), features.dtype)
            with self._tower_gradients():
                if torch.is_grad_enabled() or always_runs_tower:
                    side = tower.spec.image_size_px
                    features = tower(features.new_zeros(1, 3, side, side, dtype=dtype))[:0]
        return self.embed(batch.input_ids, features, sizes)

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

        `position_ids` do so where it takes any: a state-space LLM has no positions. With `logits_to_keep` the head runs
        on that many last tokens alone, as `generate` asks for: of a long prompt it reads one row in hundreds.
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

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Images are given to the first forward alone; behind it their keys and values stand in the cache."""
        images = {name: kwargs.pop(name, None) for name in _OF_IMAGES}
        is_first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if "output_router_logits" in self.language_inputs:
            inputs["output_router_logits"] = False  # a loss of training, which fails on one new token behind padding
        if is_first:
            return {**inputs, **images}
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        if all(getattr(cache, "is_linear", [False])):  # a state-space LLM
            inputs.pop("attention_mask", None)  # padding stands in the state already, and a new token is none
        return inputs

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """The recurrent state of a state-space LLM travels under the name by which its forward takes it."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if "cache_params" in self.language_inputs and "past_key_values" in model_kwargs:
            model_kwargs["cache_params"] = model_kwargs.pop("past_key_values")

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """An answer never holds the image token: there would be no picture for its slot."""
        never = SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device)
        return LogitsProcessorList([never, *super()._get_logits_processor(*args, **kwargs)])

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Every beam or sample of a row gets that row's images, however many they are."""
        images = {name: kwargs.pop(name) for name in _OF_IMAGES if kwargs.get(name) is not None}
        if input_ids is not None and images and expand_size > 1:
            counts = self._images_of_rows(input_ids, images)
            for name, value in images.items():
                rows = value.split(counts)
                images[name] = torch.cat([row for row in rows for _ in range(expand_size)])
        ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, {**kwargs, **images}

    def _images_of_rows(self, input_ids: Tensor, images: dict[str, Tensor]) -> list[int]:
        """How many of the images stand in each row."""
        shapes = self._shapes(images.get("image_sizes"))
        if self.layout.has_newline and "image_features" in images:
            raise ValueError(f"pictures laid out as {self.layout.kind} cannot be given as image_features to generate")
        num_images = len(next(iter(images.values())))
        ends = [self.layout.num_tokens(shape) for shape in shapes] or [self.config.num_image_tokens] * num_images
        behind = torch.tensor([0, *ends]).cumsum(0)  # slots behind each image
        slots = (input_ids == self.config.image_token_id).sum(1).cpu().cumsum(0)
        images_behind = torch.searchsorted(behind, slots, right=True) - 1
        return images_behind.diff(prepend=images_behind.new_zeros(1)).tolist()


def _build_tower(config: VisionLanguageConfig) -> VisionTower:
    assert config.vision is not None
    with _default_dtype(config.dtype_of("vision")):
        return build_tower(TowerSpec.from_json(config.vision))


def _build_projector(config: VisionLanguageConfig, vision_dim: int) -> Projector:
    assert config.projector is not None
    kind, options = config.projector["kind"], config.projector["options"]
    with _default_dtype(config.dtype_of("projector")):
        return build_projector(kind, vision_dim=vision_dim, llm_dim=config.text_config.hidden_size, **options)


AutoConfig.register(VisionLanguageConfig.model_type, VisionLanguageConfig, exist_ok=True)
AutoModelForImageTextToText.register(VisionLanguageConfig, VisionLanguageModel, exist_ok=True)
