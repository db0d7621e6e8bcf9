"""PP-YOLOE (Xu et al., 2022): CSP-ResNet of re-parametrised blocks, PAN, a task-aligned head, in four sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydet.losses import PPYoloELoss
from raydet.models.blocks import PRIOR_LOGIT, REG_MAX, Conv, Pyramid, RepVGG, decode, dfl_output
from raydet.models.family import Adapter, Detector, Family, Preprocessing
from raydet.postprocess import PPYoloEPostPredictionCallback

STRIDES = (32, 16, 8)  # the neck gives its maps from coarse to fine

_EPS, _MOMENTUM = 1e-5, 0.1
_conv = partial(Conv, eps=_EPS, momentum=_MOMENTUM)


class Block(nn.Module):
    """A 3x3 convolution and a re-parametrised one, with a shortcut around both where asked for."""

    def __init__(self, channels: int, shortcut: bool):
        super().__init__()
        self.conv1 = _conv(channels, channels, 3)
        self.conv2 = RepVGG(channels, nn.SiLU, _EPS, _MOMENTUM)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        y: Tensor = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class EffectiveSE(nn.Module):
    """Weigh the channels by what they hold on average (Lee and Park, CenterMask, 2020)."""

    def __init__(self, channels: int):
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return x * F.hardsigmoid(self.project(x.mean((2, 3), keepdim=True)))


class Stage(nn.Module):
    """A stage of the backbone: halve the size; half of the channels through blocks, half around them."""

    def __init__(self, in_channels: int, out_channels: int, depth: int):
        super().__init__()
        half = (in_channels + out_channels) // 2 // 2
        self.conv_down = _conv(in_channels, 2 * half, 3, 2)
        self.conv1 = _conv(2 * half, half, 1)
        self.conv2 = _conv(2 * half, half, 1)
        self.blocks = nn.Sequential(*(Block(half, shortcut=True) for _ in range(depth)))
        self.attn = EffectiveSE(2 * half)
        self.conv3 = _conv(2 * half, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H / 2, W / 2]."""
        x = self.conv_down(x)
        x = torch.cat((self.conv1(x), self.blocks(self.conv2(x))), dim=1)
        y: Tensor = self.conv3(self.attn(x))
        return y


class CSPResNet(nn.Module):
    """PP-YOLOE's backbone."""

    def __init__(self, depth: float, width: float):
        super().__init__()
        base, *channels = (round(c * width) for c in (64, 128, 256, 512, 1024))
        depths = [max(round(n * depth), 1) for n in (3, 6, 6, 3)]
        self.stem = nn.Sequential(_conv(3, base // 2, 3, 2), _conv(base // 2, base // 2, 3), _conv(base // 2, base, 3))
        inputs = [base, *channels[:-1]]
        self.stages = nn.ModuleList(Stage(*sizes) for sizes in zip(inputs, channels, depths, strict=True))
        self.out_channels = tuple(channels[1:])

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] → maps at strides 8, 16 and 32."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


class NeckStage(nn.Module):
    """Half of the channels through blocks, half around them; with pyramid pooling after the middle block or without."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, spp: bool):
        super().__init__()
        half = out_channels // 2
        self.conv1 = _conv(in_channels, half, 1)
        self.conv2 = _conv(in_channels, half, 1)
        self.convs = nn.Sequential()
        for number in range(depth):
            self.convs.add_module(str(number), Block(half, shortcut=False))
            if spp and number == (depth - 1) // 2:
                self.convs.add_module("spp", nn.Sequential(Pyramid(), _conv(4 * half, half, 1)))
        self.conv3 = _conv(2 * half, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H, W]."""
        y: Tensor = self.conv3(torch.cat((self.conv1(x), self.convs(self.conv2(x))), dim=1))
        return y


class CSPPAN(nn.Module):
    """Path aggregation: features go from coarse to fine, then back (Liu et al., PANet, 2018)."""

    def __init__(self, in_channels: tuple[int, ...], depth: float, width: float):
        super().__init__()
        coarse_to_fine = in_channels[::-1]
        blocks = max(round(3 * depth), 1)
        out = [round(c * width) for c in (768, 384, 192)]
        above = [0, *(c // 2 for c in out[:-1])]
        self.fpn_stages = nn.ModuleList(
            NeckStage(coarse_to_fine[level] + above[level], out[level], blocks, spp=level == 0) for level in range(3)
        )
        self.fpn_routes = nn.ModuleList(_conv(out[level], out[level] // 2, 1) for level in range(2))
        self.pan_routes = nn.ModuleList(_conv(out[level + 1], out[level + 1], 3, 2) for level in range(2))
        self.pan_stages = nn.ModuleList(
            NeckStage(out[level] + out[level + 1], out[level], blocks, spp=False) for level in range(2)
        )
        self.out_channels = tuple(out)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps at strides 8, 16 and 32 → maps at strides 32, 16 and 8."""
        down: list[Tensor] = []
        for level, feature in enumerate(reversed(features)):
            if level:
                route = F.interpolate(self.fpn_routes[level - 1](down[-1]), scale_factor=2.0)
                down.append(self.fpn_stages[level](torch.cat((route, feature), dim=1)))
            else:
                down.append(self.fpn_stages[level](feature))
        up = [down[2]]
        for level in (1, 0):
            up.append(self.pan_stages[level](torch.cat((self.pan_routes[level](up[-1]), down[level]), dim=1)))
        return up[::-1]


class ESEAttention(nn.Module):
    """Weigh a map's channels by what they hold on average, then mix them."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        self.conv = _conv(channels, channels, 1)
        nn.init.normal_(self.fc.weight, std=0.001)

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        """[B, C, H, W] and its mean over the map [B, C, 1, 1] → [B, C, H, W]."""
        y: Tensor = self.conv(x * self.fc(mean).sigmoid())
        return y


class PPYoloEHead(nn.Module):
    """Class logits, and box sides as distributions, for one anchor point a cell; its output is `dfl_output`'s."""

    post_prediction = PPYoloEPostPredictionCallback
    decode = staticmethod(decode)

    def __init__(self, in_channels: tuple[int, ...], num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.stem_cls = nn.ModuleList(ESEAttention(channels) for channels in in_channels)
        self.stem_reg = nn.ModuleList(ESEAttention(channels) for channels in in_channels)
        self.cls_preds = nn.ModuleList(nn.Conv2d(channels, num_classes, 3, padding=1) for channels in in_channels)
        self.reg_preds = nn.ModuleList(nn.Conv2d(channels, 4 * (REG_MAX + 1), 3, padding=1) for channels in in_channels)
        for predictions, bias in ((self.cls_preds, PRIOR_LOGIT), (self.reg_preds, 1.0)):
            for name, parameter in predictions.named_parameters():
                nn.init.constant_(parameter, bias if name.endswith("bias") else 0.0)

    def forward(self, features: list[Tensor]) -> Any:
        """Maps at strides 32, 16 and 8 → see `dfl_output`."""
        cls_maps, reg_maps = [], []
        for level, feature in enumerate(features):
            mean = feature.mean((2, 3), keepdim=True)
            cls_maps.append(self.cls_preds[level](self.stem_cls[level](feature, mean) + feature))
            reg_maps.append(self.reg_preds[level](self.stem_reg[level](feature, mean)))
        return dfl_output(cls_maps, reg_maps, STRIDES, self)


class PPYoloE(Detector):
    """PP-YOLOE; the subclasses set depth and width."""

    depth: float
    width: float

    def __init__(self, num_classes: int = 80):
        backbone = CSPResNet(self.depth, self.width)
        neck = CSPPAN(backbone.out_channels, self.depth, self.width)
        super().__init__(backbone, neck, PPYoloEHead(neck.out_channels, num_classes))


class PPYoloE_S(PPYoloE):
    """PP-YOLOE-s: 7.93 M parameters when fused."""

    depth, width = 0.33, 0.5


class PPYoloE_M(PPYoloE):
    """PP-YOLOE-m: 23.4 M parameters when fused."""

    depth, width = 0.67, 0.75


class PPYoloE_L(PPYoloE):
    """PP-YOLOE-l: 52.2 M parameters when fused."""

    depth, width = 1.0, 1.0


class PPYoloE_X(PPYoloE):
    """PP-YOLOE-x: 98.4 M parameters when fused."""

    depth, width = 1.33, 1.25


FAMILY = Family(
    name="PP-YOLOE",
    models={"ppyoloe_s": PPYoloE_S, "ppyoloe_m": PPYoloE_M, "ppyoloe_l": PPYoloE_L, "ppyoloe_x": PPYoloE_X},
    head=PPYoloEHead,
    losses=(PPYoloELoss,),
    # The reference applies ImageNet's constants for R, G, B to B, G, R, and its weights expect that.
    preprocessing=Preprocessing(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), resize="stretch"),
    adapters=(
        Adapter(
            source="PP-YOLOE under super-gradients' names",
            licence="Apache-2.0 (super-gradients)",
            mark=r"^backbone\.stem\.conv1\.seq\.",
            renames=(
                (r"\.seq\.", "."),
                (r"^backbone\.stem\.conv1\.", "backbone.stem.0."),
                (r"^backbone\.stem\.conv2\.", "backbone.stem.1."),
                (r"^backbone\.stem\.conv3\.", "backbone.stem.2."),
                (r"^neck\.(fpn|pan)_stages\.(\d)\.0\.", r"neck.\1_stages.\2."),
                (r"\.convs\.spp\.conv\.", ".convs.spp.1."),
                (r"^head\.pred_(cls|reg)\.", r"head.\1_preds."),
            ),
            unused=r"^head\.proj_conv\b",  # a constant, in early files
        ),
    ),
    recipe="ppyoloe_finetune",
)
