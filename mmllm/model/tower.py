"""The contract of every vision tower, and the plain values that describe one.

Shapes: `N` images, `C H W` one image, `P` patches per image, `Dv` vision width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mmllm.config import ConfigError

INTERPOLATIONS = {"bicubic": 3, "bilinear": 2}  # open_clip's names -> PIL.Image.Resampling


@dataclass(frozen=True)
class TowerSpec:
    """A tower in plain values: its encoder's config, the layers to read, and the image transform of its training."""

    model_cfg: dict[str, Any]  # with the family's own keys
    layer: int | tuple[int, ...]  # negative, counted from the last; several are concatenated by channel
    image_size_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    source: str
    family: str = "open_clip"  # a key of TOWERS

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,) if isinstance(self.layer, int) else self.layer

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> TowerSpec:
        tuples = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        return TowerSpec(**{**data, **tuples})


_SHAPES: dict[str, tuple[int, int]] = {}  # {spec as JSON: patches and width of its tower}


class VisionTower(nn.Module):
    """pixels [N, C, H, W] -> patch tokens [N, P, Dv] in row-major order, without CLS or registers.

    Patch tokens are the output of a layer as the next one would get it, without the encoder's final norm, as LLaVA does
    (https://arxiv.org/abs/2304.08485). Nothing after the last layer that is read is built.
    """

    num_patches: int
    width: int

    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.spec = spec

    def blocks(self) -> list[nn.Module]:
        """The layers in the order in which they run, so that the last ones can be trained alone."""
        raise NotImplementedError

    def checkpoint_layers(self) -> None:
        """Turns on gradient checkpointing: in training a layer keeps only its input, and runs again in backward.

        The libraries do so for some encoders and silently skip others, so it is done here. Raises ConfigError for an
        encoder with batch norm, which would count every batch twice.
        """
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules()):
            raise ConfigError(
                f"compute.gradient_checkpointing: the encoder of {self.spec.source} has batch norm, which would count "
                "every batch twice; take vision out of the list"
            )
        for block in self.blocks():
            block.forward = _recomputed(block, block.forward)

    def _indices(self, num_layers: int) -> list[int]:
        """The layers to read, counted from 0. Raises ConfigError where there is no such layer."""
        for layer in self.spec.layers:
            if not -num_layers <= layer < 0:
                raise ConfigError(
                    f"model.vision.feature_layer: {layer} is not a layer; this tower has -{num_layers} to -1"
                )
        return [num_layers + layer for layer in self.spec.layers]

    @torch.no_grad()
    def _probe(self) -> None:
        """Finds `num_patches` and `width` by one forward pass, on the meta device if the weights are there.

        A run builds its tower several times, so what a spec gives is kept.
        """
        key = json.dumps(self.spec.to_json(), sort_keys=True)
        if key not in _SHAPES:
            _SHAPES[key] = self._output_shape()
        self.num_patches, self.width = _SHAPES[key]

    def _output_shape(self) -> tuple[int, int]:
        side, parameter = self.spec.image_size_px, next(self.parameters())
        was_training = self.training
        self.eval()
        buffers = {name: buffer.to(parameter.device) for name, buffer in self.named_buffers()}
        pixels = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
        patches = functional_call(self, buffers, (pixels,))
        self.train(was_training)
        return patches.shape[1], patches.shape[2]


class LayeredTower(VisionTower):
    """A tower that reads some of its encoder's layers."""

    encoder: Any

    def load_encoder_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Loads the weights of a whole encoder; those after the last layer that is read are ignored."""
        self.encoder.load_state_dict({key: weights[key] for key in self.encoder.state_dict()})


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def concatenate(maps: Sequence[Tensor]) -> Tensor:
    """Concatenates layers' outputs [N, P, width] by channel. Raises ConfigError where they differ in P."""
    if len({features.shape[1] for features in maps}) > 1:
        counts = ", ".join(str(features.shape[1]) for features in maps)
        raise ConfigError(f"model.vision.feature_layer: these layers have {counts} patches; read layers of one size")
    return torch.cat(list(maps), dim=2) if len(maps) > 1 else maps[0]
