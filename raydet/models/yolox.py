"""YOLOX (Ge et al., 2021): CSP-Darknet, PAN and a decoupled, anchor-free head, in six sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raydet.losses import YoloXDetectionLoss, YoloXFastDetectionLoss
from raydet.models.blocks import PRIOR_LOGIT, SPP, Conv, CSPLayer, DepthwiseConv
from raydet.models.family import Adapter, Detector, Family, Preprocessing
from raydet.outputs import anchor_cells, decode_yolox
from raydet.postprocess import YoloXPostPredictionCallback

STRIDES = (8, 16, 32)


class CSPDarknet(nn.Module):
    """YOLOX's backbone.

    The stem is a 6x6 convolution of stride 2. It is the same function as the Focus slicing with a 3x3 convolution of
    the paper: each of its four slices is every second pixel of every second row.
    """

    def __init__(self, depth: float, width: float, depthwise: bool):
        super().__init__()
        spatial = DepthwiseConv if depthwise else Conv
        base, blocks = int(64 * width), max(round(3 * depth), 1)
        self.stem = Conv(3, base, 6, 2, padding=2)
        self.dark2 = nn.Sequential(
            spatial(base, 2 * base, 3, 2), CSPLayer(2 * base, 2 * base, blocks, shortcut=True, spatial=spatial)
        )
        self.dark3 = nn.Sequential(
            spatial(2 * base, 4 * base, 3, 2), CSPLayer(4 * base, 4 * base, 3 * blocks, shortcut=True, spatial=spatial)
        )
        self.dark4 = nn.Sequential(
            spatial(4 * base, 8 * base, 3, 2), CSPLayer(8 * base, 8 * base, 3 * blocks, shortcut=True, spatial=spatial)
        )
        self.dark5 = nn.Sequential(
            spatial(8 * base, 16 * base, 3, 2),
            SPP(16 * base, 16 * base),
            CSPLayer(16 * base, 16 * base, blocks, shortcut=False, spatial=spatial),
        )
        self.out_channels = (4 * base, 8 * base, 16 * base)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H, W] → maps at strides 8, 16 and 32."""
        c3 = self.dark3(self.dark2(self.stem(images)))
        c4 = self.dark4(c3)
        return c3, c4, self.dark5(c4)


class YoloXPAN(nn.Module):
    """Path aggregation: features go from coarse to fine, then back (Liu et al., PANet, 2018).

    Args:
        in_channels: number of channels of the maps at strides 8, 16 and 32; the results have the same.
        blocks: number of bottlenecks in each layer.
        depthwise: use depthwise convolutions.
    """

    def __init__(self, in_channels: Sequence[int], blocks: int = 1, depthwise: bool = False):
        super().__init__()
        spatial = DepthwiseConv if depthwise else Conv
        p3, p4, p5 = in_channels

        def csp(in_channels: int, out_channels: int) -> CSPLayer:
            return CSPLayer(in_channels, out_channels, blocks, shortcut=False, spatial=spatial)

        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.lateral_conv0 = Conv(p5, p4, 1)
        self.C3_p4 = csp(2 * p4, p4)
        self.reduce_conv1 = Conv(p4, p3, 1)
        self.C3_p3 = csp(2 * p3, p3)
        self.bu_conv2 = spatial(p3, p3, 3, 2)
        self.C3_n3 = csp(2 * p3, p4)
        self.bu_conv1 = spatial(p4, p4, 3, 2)
        self.C3_n4 = csp(2 * p4, p5)
        self.out_channels = tuple(in_channels)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Maps at strides 8, 16 and 32 → the same shapes."""
        c3, c4, c5 = features
        top5 = self.lateral_conv0(c5)
        top4 = self.reduce_conv1(self.C3_p4(torch.cat((self.upsample(top5), c4), dim=1)))
        p3 = self.C3_p3(torch.cat((self.upsample(top4), c3), dim=1))
        p4 = self.C3_n3(torch.cat((self.bu_conv2(p3), top4), dim=1))
        p5 = self.C3_n4(torch.cat((self.bu_conv1(p4), top5), dim=1))
        return p3, p4, p5


class YoloXHead(nn.Module):
    """Separate branches for class and box on each level; one prediction an anchor point.

    Training: list of raw maps [B, 1, H / s, W / s, 5 + C], last axis = box (4), objectness, classes, all before any
    activation. Evaluation: (decoded [B, L, 5 + C] = cx, cy, w, h in pixels, objectness and class probabilities, the raw
    maps).

    Args:
        in_channels: number of channels of each of the three maps.
        num_classes: number of classes, C.
        hidden: number of channels of the branches.
        depthwise: use depthwise convolutions.
    """

    post_prediction = YoloXPostPredictionCallback

    def __init__(self, in_channels: Sequence[int], num_classes: int, hidden: int, depthwise: bool = False):
        super().__init__()
        spatial = DepthwiseConv if depthwise else Conv

        def branch() -> nn.Sequential:
            return nn.Sequential(spatial(hidden, hidden, 3), spatial(hidden, hidden, 3))

        self.num_classes = num_classes
        self.stems = nn.ModuleList(Conv(channels, hidden, 1) for channels in in_channels)
        self.cls_convs = nn.ModuleList(branch() for _ in in_channels)
        self.reg_convs = nn.ModuleList(branch() for _ in in_channels)
        self.cls_preds = nn.ModuleList(nn.Conv2d(hidden, num_classes, 1) for _ in in_channels)
        self.reg_preds = nn.ModuleList(nn.Conv2d(hidden, 4, 1) for _ in in_channels)
        self.obj_preds = nn.ModuleList(nn.Conv2d(hidden, 1, 1) for _ in in_channels)
        for prediction in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(prediction.bias, PRIOR_LOGIT)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> Any:
        """Maps at strides 8, 16 and 32 → see the class."""
        maps = []
        for level, feature in enumerate(features):
            x = self.stems[level](feature)
            cls, reg = self.cls_convs[level](x), self.reg_convs[level](x)
            raw = (self.reg_preds[level](reg), self.obj_preds[level](reg), self.cls_preds[level](cls))
            maps.append(torch.cat(raw, dim=1).permute(0, 2, 3, 1).unsqueeze(1))
        return maps if self.training else self.decode(maps)

    def decode(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Training output → evaluation output."""
        return decode(maps), maps


def decode(maps: list[Tensor]) -> Tensor:
    """Raw maps → [B, L, 5 + C]: cx, cy, w, h in pixels, objectness and class probabilities, in float32."""
    raw = torch.cat([level.flatten(1, 3) for level in maps], dim=1).float()
    cells, strides = anchor_cells([(level.shape[2], level.shape[3]) for level in maps], STRIDES, raw.device)
    return torch.cat((decode_yolox(raw[..., :4], cells, strides), raw[..., 4:].sigmoid()), dim=-1)


class YoloX(Detector):
    """YOLOX; the subclasses set depth and width. Input: BGR, 0 … 255."""

    depth: float
    width: float
    depthwise = False

    def __init__(self, num_classes: int = 80):
        backbone = CSPDarknet(self.depth, self.width, self.depthwise)
        neck = YoloXPAN(backbone.out_channels, max(round(3 * self.depth), 1), self.depthwise)
        super().__init__(
            backbone, neck, YoloXHead(neck.out_channels, num_classes, int(256 * self.width), self.depthwise)
        )


class YoloX_N(YoloX):
    """YOLOX-nano: 0.91 M parameters, depthwise convolutions."""

    depth, width, depthwise = 0.33, 0.25, True


class YoloX_T(YoloX):
    """YOLOX-tiny: 5.06 M parameters."""

    depth, width = 0.33, 0.375


class YoloX_S(YoloX):
    """YOLOX-s: 8.97 M parameters."""

    depth, width = 0.33, 0.5


class YoloX_M(YoloX):
    """YOLOX-m: 25.3 M parameters."""

    depth, width = 0.67, 0.75


class YoloX_L(YoloX):
    """YOLOX-l: 54.2 M parameters."""

    depth, width = 1.0, 1.0


class YoloX_X(YoloX):
    """YOLOX-x: 99.1 M parameters."""

    depth, width = 1.33, 1.25


def _focus_as_convolution(kernel: Tensor) -> Tensor:
    """[C, 12, 3, 3] over the four slices of Focus → [C, 3, 6, 6] of stride 2 over the pixels, the same function."""
    if kernel.shape[1:] != (12, 3, 3):  # a convolution already, as in later files of super-gradients
        return kernel
    pixels = kernel.new_empty(len(kernel), 3, 6, 6)
    for slot, (row, column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        pixels[:, :, row::2, column::2] = kernel[:, 3 * slot : 3 * slot + 3]
    return pixels


# super-gradients numbers the parts: those of its `_backbone`, then those of its `_head`, which is our neck and head.
_SG_BACKBONE = (
    "stem",
    "dark2.0",
    "dark2.1",
    "dark3.0",
    "dark3.1",
    "dark4.0",
    "dark4.1",
    "dark5.0",
    "dark5.1",
    "dark5.2",
)
_SG_HEAD = {
    0: "neck.lateral_conv0",
    3: "neck.C3_p4",
    4: "neck.reduce_conv1",
    7: "neck.C3_p3",
    8: "neck.bu_conv2",
    10: "neck.C3_n3",
    11: "neck.bu_conv1",
    13: "neck.C3_n4",
    14: "head",
}

FAMILY = Family(
    name="YOLOX",
    models={
        "yolox_n": YoloX_N,
        "yolox_t": YoloX_T,
        "yolox_s": YoloX_S,
        "yolox_m": YoloX_M,
        "yolox_l": YoloX_L,
        "yolox_x": YoloX_X,
    },
    head=YoloXHead,
    losses=(YoloXFastDetectionLoss, YoloXDetectionLoss),
    preprocessing=Preprocessing(),
    adapters=(
        Adapter(
            source="YOLOX under Megvii's names",
            licence="Apache-2.0 (Megvii YOLOX)",
            mark=r"^backbone\.backbone\.",
            renames=(
                (r"^backbone\.((?:lateral|reduce|bu)_conv\d|C3_[pn]\d)\.", r"neck.\1."),
                (r"^backbone\.backbone\.stem\.conv\.", "backbone.stem."),
                (r"^backbone\.backbone\.", "backbone."),
            ),
            convert={"backbone.stem.conv.weight": _focus_as_convolution},
        ),
        Adapter(
            source="YOLOX under super-gradients' names",
            licence="Apache-2.0 (super-gradients)",
            mark=r"^_backbone\._modules_list\.",
            renames=(
                # The files that it published have a Focus stem, and names that changed later.
                (r"^(_backbone\._modules_list\.0)\.conv\.(?=conv\.|bn\.)", r"\1."),
                # Names of a depthwise pair, before other rules make names like these.
                (r"\.conv\.(?=conv\.|bn\.)", ".pconv."),
                *(
                    (rf"^_backbone\._modules_list\.{number}\.", f"backbone.{name}.")
                    for number, name in enumerate(_SG_BACKBONE)
                ),
                *((rf"^_head\._modules_list\.{number}\.", f"{name}.") for number, name in _SG_HEAD.items()),
                (r"\.(?:bottlenecks|m)\.(\d+)\.cv", r".m.\1.conv"),
                (r"^(backbone\.dark\d\.\d|neck\.C3_\w\d)\.cv", r"\1.conv"),
            ),
            unused=r"(^|\.)stride$|^_head\.anchors\.",
            convert={"backbone.stem.conv.weight": _focus_as_convolution},
        ),
    ),
    recipe="yolox_finetune",
)
