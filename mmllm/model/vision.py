"""Vision towers by family: open_clip, transformers, `patches` (no encoder at all), and two of them fused.

A checkpoint stores the plain values of its tower (`TowerSpec.to_json`), so the tower is rebuilt without registry,
pretrained weights or network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmllm.config import ConfigError, TowerConfig, VisionConfig
from mmllm.model.tower import TowerSpec, VisionTower
from mmllm.model.vision_open_clip import OpenClipTower, load_open_clip_tower
from mmllm.model.vision_transformers import TRANSFORMERS, TransformersTower, load_transformers_tower

PATCHES = "patches:"
DEFAULT_PATCHES_SIZE_PX = 224


class PatchTower(VisionTower):
    """No encoder: each patch's raw pixels [C * size * size]. Fuyu, https://www.adept.ai/blog/fuyu-8b"""

    def __init__(self, spec: TowerSpec):
        super().__init__(spec)
        self.patch_size_px = int(spec.model_cfg["patch_size"])
        if spec.image_size_px % self.patch_size_px:
            raise ConfigError(
                f"model.vision.image_size_px: {spec.image_size_px} is not a multiple of the patch size, "
                f"{self.patch_size_px}"
            )
        self.num_patches = (spec.image_size_px // self.patch_size_px) ** 2
        self.width = 3 * self.patch_size_px**2

    def blocks(self) -> list[nn.Module]:
        return []

    def forward(self, pixels: Tensor) -> Tensor:  # [N, C, H, W] -> [N, P, Dv]
        size = self.patch_size_px
        return nn.functional.unfold(pixels, kernel_size=size, stride=size).transpose(1, 2)


class FusedTower(VisionTower):
    """Two towers that see the same picture, their patches concatenated by channel: Dv is the sum of their widths.

    Pixels arrive normalized for the first; the second gets them renormalized with its own mean and standard deviation.
    Prismatic, https://arxiv.org/abs/2402.07865
    """

    def __init__(self, spec: TowerSpec):
        super().__init__(spec)
        self.first = build_tower(TowerSpec.from_json(spec.model_cfg["first"]))
        self.second = build_tower(TowerSpec.from_json(spec.model_cfg["second"]))
        _check_fusion(self.first, self.second)
        self.num_patches, self.width = self.first.num_patches, self.first.width + self.second.width

    @staticmethod
    def join(first: VisionTower, second: VisionTower) -> FusedTower:
        """Fuses two loaded towers. Raises ConfigError where they differ in image size or number of patches."""
        _check_fusion(first, second)
        base = first.spec
        parts = {"first": base.to_json(), "second": second.spec.to_json()}
        source = f"{base.source} + {second.spec.source}"
        spec = TowerSpec(parts, -1, base.image_size_px, base.mean, base.std, base.interpolation, source, "fused")
        with torch.device("meta"):
            tower = FusedTower(spec)
        tower.first, tower.second = first, second
        return tower

    def blocks(self) -> list[nn.Module]:
        """Pairs of layers, counted from the last, so that the last k of both towers can be trained."""
        pairs = zip(reversed(self.first.blocks()), reversed(self.second.blocks()), strict=False)
        blocks: list[nn.Module] = [nn.ModuleList(pair) for pair in pairs]
        return blocks[::-1]

    def checkpoint_layers(self) -> None:
        self.first.checkpoint_layers()
        self.second.checkpoint_layers()

    def forward(self, pixels: Tensor) -> Tensor:  # [N, C, H, W] -> [N, P, Dv]
        first, second = self.first.spec, self.second.spec
        stats = [
            pixels.new_tensor(values).view(-1, 1, 1) for values in (first.mean, first.std, second.mean, second.std)
        ]
        renormalized = (pixels * stats[1] + stats[0] - stats[2]) / stats[3]
        return torch.cat([self.first(pixels), self.second(renormalized)], dim=2)


def _check_fusion(first: VisionTower, second: VisionTower) -> None:
    sizes = [tower.spec.image_size_px for tower in (first, second)]
    if sizes[0] != sizes[1] or first.num_patches != second.num_patches:
        raise ConfigError(
            f"model.vision.fuse_with: {first.spec.source} has {first.num_patches} patches of a picture of {sizes[0]} "
            f"pixels, {second.spec.source} has {second.num_patches} of {sizes[1]}; both need the same picture size "
            "and number of patches: set image_size_px of one"
        )


TOWERS: dict[str, type[VisionTower]] = {
    "open_clip": OpenClipTower,
    "transformers": TransformersTower,
    "patches": PatchTower,
    "fused": FusedTower,
}


def build_tower(spec: TowerSpec) -> VisionTower:
    """The tower of a spec with fresh weights."""
    return TOWERS[spec.family](spec)


def load_tower(config: VisionConfig) -> VisionTower:
    """The pretrained tower of a run's settings. Raises ConfigError where it has no weights or no such layer."""
    tower = _load_single(config)
    return FusedTower.join(tower, _load_single(config.fuse_with)) if config.fuse_with else tower


def _load_single(config: TowerConfig) -> VisionTower:
    if config.source.startswith(TRANSFORMERS):
        return load_transformers_tower(config)
    if not config.source.startswith(PATCHES):
        return load_open_clip_tower(config)
    size = config.source.removeprefix(PATCHES)
    if not size.isdigit() or int(size) == 0:
        raise ConfigError(f"model.vision.source: {config.source} must say the side of a patch in pixels: patches:16")
    side = config.image_size_px or DEFAULT_PATCHES_SIZE_PX
    half = (0.5,) * 3  # pixels from -1 to 1, as Fuyu has them
    return PatchTower(TowerSpec({"patch_size": int(size)}, -1, side, half, half, "bicubic", config.source, "patches"))
