"""What a vision tower is: the contract of every family of encoders, and the plain values that describe one.

Shapes: `N` images, `C H W` one image, `P` patches per image, `Dv` vision width.
"""

from __future__ import annotations

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
    """What a tower is: its encoder's config, the layers that are read, and the image transform of its training."""

    model_cfg: dict[str, Any]  # in the family's own words
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


class VisionTower(nn.Module):
    """pixels [N, C, H, W] -> patch tokens [N, P, Dv], row by row, without CLS or registers.

    Read is the output of a layer as the next one would get it, without the encoder's final norm, as LLaVA does
    (https://arxiv.org/abs/2304.08485). What stands behind the last layer that is read is not built.
    """

    num_patches: int
    width: int

    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.spec = spec

    def blocks(self) -> list[nn.Module]:
        """The layers in the order in which they run, for training the last ones alone."""
        raise NotImplementedError

    def checkpoint_layers(self) -> None:
        """From now on a layer in training keeps its input alone, and runs again in backward.

        Not left to the libraries: of one encoder they do it, of another they leave it out and say nothing. Raises
        ConfigError where running twice is not the same as once.
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
        """Counts patches and width by one run, on no memory where the weights have none."""
        side, parameter = self.spec.image_size_px, next(self.parameters())
        was_training = self.training
        self.eval()
        buffers = {name: buffer.to(parameter.device) for name, buffer in self.named_buffers()}
        pixels = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
        patches = functional_call(self, buffers, (pixels,))
        self.train(was_training)
        self.num_patches, self.width = patches.shape[1], patches.shape[2]


class LayeredTower(VisionTower):
    """A tower with an encoder of layers, of which some are read."""

    encoder: Any

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights of a whole encoder; what it has behind the last layer that is read is left out."""
        self.encoder.load_state_dict({key: weights[key] for key in self.encoder.state_dict()})


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def concatenate(maps: Sequence[Tensor]) -> Tensor:
    """Layers' outputs [N, P, width] side by side. Raises ConfigError where their grids differ."""
    if len({one.shape[1] for one in maps}) > 1:
        counts = ", ".join(str(one.shape[1]) for one in maps)
        raise ConfigError(f"model.vision.feature_layer: these layers have {counts} patches; read layers of one size")
    return torch.cat(list(maps), dim=2) if len(maps) > 1 else maps[0]
