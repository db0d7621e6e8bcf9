"""HGNetv2, the backbone of D-FINE: PaddlePaddle's PP-HGNetV2, in the seven sizes B0 to B6."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydet.models.blocks import Conv, FrozenNorm

_EPS, _MOMENTUM = 1e-5, 0.1


class Affine(nn.Module):
    """One learnt scale and one learnt shift for a whole map."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return self.scale * x + self.bias


class Unit(Conv):
    """Convolution, norm, ReLU and, where asked for, a learnt affine map of the result.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: side in pixels.
        stride: in pixels.
        groups: number of groups of channels that do not mix.
        act: class of the activation.
        affine: whether the affine map follows the activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] = nn.ReLU,
        affine: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel, stride, groups, act=act, eps=_EPS, momentum=_MOMENTUM)
        self.lab = Affine() if affine else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H / stride, W / stride]."""
        y: Tensor = self.lab(super().forward(x))
        return y


class LightUnit(nn.Module):
    """A convolution of 1x1 over the channels, then one of each channel by itself."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, affine: bool):
        super().__init__()
        self.conv1 = Unit(in_channels, out_channels, 1, act=nn.Identity)
        self.conv2 = Unit(out_channels, out_channels, kernel, groups=out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H, W]."""
        y: Tensor = self.conv2(self.conv1(x))
        return y


class Stem(nn.Module):
    """The first five convolutions: a quarter of the size."""

    def __init__(self, middle: int, out_channels: int, affine: bool):
        super().__init__()
        self.stem1 = Unit(3, middle, 3, 2, affine=affine)
        self.stem2a = Unit(middle, middle // 2, 2, affine=affine)
        self.stem2b = Unit(middle // 2, middle, 2, affine=affine)
        self.stem3 = Unit(2 * middle, middle, 3, 2, affine=affine)
        self.stem4 = Unit(middle, out_channels, 1, affine=affine)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, out, H / 4, W / 4]."""
        x = F.pad(self.stem1(images), (0, 1, 0, 1))  # kernels of two pixels need one more at the right and the bottom
        pooled = F.max_pool2d(x, 2, stride=1)
        convolved = self.stem2b(F.pad(self.stem2a(x), (0, 1, 0, 1)))
        y: Tensor = self.stem4(self.stem3(torch.cat((pooled, convolved), dim=1)))
        return y


class Block(nn.Module):
    """Layers in a row; the input and every layer's output are joined and mixed. Only later blocks have a shortcut."""

    def __init__(
        self, in_channels: int, middle: int, out_channels: int, depth: int, light: bool, shortcut: bool, affine: bool
    ):
        super().__init__()
        inputs = [in_channels, *[middle] * (depth - 1)]
        self.layers = nn.ModuleList(
            LightUnit(channels, middle, 5, affine) if light else Unit(channels, middle, 3, affine=affine)
            for channels in inputs
        )
        self.aggregation = nn.Sequential(
            Unit(in_channels + depth * middle, out_channels // 2, 1, affine=affine),
            Unit(out_channels // 2, out_channels, 1, affine=affine),
        )
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H, W]."""
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        y: Tensor = self.aggregation(torch.cat(outputs, dim=1))
        return y + x if self.shortcut else y


class Stage(nn.Module):
    """Half the size, but in the first stage, then blocks."""

    def __init__(self, number: int, channels: tuple[int, int, int], blocks: int, depth: int, affine: bool):
        super().__init__()
        first, middle, out = channels
        down = Unit(first, first, 3, 2, groups=first, act=nn.Identity) if number else nn.Identity()
        self.downsample = down
        self.blocks = nn.Sequential(
            *(
                Block(out if index else first, middle, out, depth, number >= 2, index > 0, affine)
                for index in range(blocks)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H / 2, W / 2], or of the same size in the first stage."""
        y: Tensor = self.blocks(self.downsample(x))
        return y


class Size(NamedTuple):
    """Channels of the stem, channels (in, middle, out) and number of blocks of each stage, and layers of a block."""

    stem: tuple[int, int]
    stages: tuple[tuple[int, int, int], ...]
    blocks: tuple[int, ...]
    depth: int


SIZES = {
    "B0": Size((16, 16), ((16, 16, 64), (64, 32, 256), (256, 64, 512), (512, 128, 1024)), (1, 1, 2, 1), 3),
    "B1": Size((24, 32), ((32, 32, 64), (64, 48, 256), (256, 96, 512), (512, 192, 1024)), (1, 1, 2, 1), 3),
    "B2": Size((24, 32), ((32, 32, 96), (96, 64, 384), (384, 128, 768), (768, 256, 1536)), (1, 1, 3, 1), 4),
    "B3": Size((24, 32), ((32, 32, 128), (128, 64, 512), (512, 128, 1024), (1024, 256, 2048)), (1, 1, 3, 1), 5),
    "B4": Size((32, 48), ((48, 48, 128), (128, 96, 512), (512, 192, 1024), (1024, 384, 2048)), (1, 1, 3, 1), 6),
    "B5": Size((32, 64), ((64, 64, 128), (128, 128, 512), (512, 256, 1024), (1024, 512, 2048)), (1, 2, 5, 2), 6),
    "B6": Size((48, 96), ((96, 96, 192), (192, 192, 512), (512, 384, 1024), (1024, 768, 2048)), (2, 3, 6, 3), 6),
}


class HGNetv2(nn.Module):
    """The backbone.

    Args:
        size: one of `SIZES`.
        levels: number of maps that are returned, the coarsest of strides 4, 8, 16 and 32.
        affine: whether units have the learnt affine map.
        frozen: whether the norms, and the stem, are constants.
    """

    def __init__(self, size: str, levels: int, affine: bool, frozen: bool):
        super().__init__()
        (middle, out), stages, blocks, depth = SIZES[size]
        self.stem = Stem(middle, out, affine)
        self.stages = nn.ModuleList(
            Stage(number, channels, count, depth, affine)
            for number, (channels, count) in enumerate(zip(stages, blocks, strict=True))
        )
        self.levels = levels
        self.out_channels = tuple(channels[2] for channels in stages)[-levels:]
        if frozen:
            for module in self.modules():
                if isinstance(module, Unit):
                    module.bn = FrozenNorm(module.bn.num_features, _EPS)  # type: ignore[assignment]
            self.stem.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] → maps, from fine to coarse."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-self.levels :]
