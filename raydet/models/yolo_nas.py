"""YOLO-NAS (Deci, 2023): an architecture found by search, of quantization-friendly blocks, in three sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raydet.losses import PPYoloELoss
from raydet.models.blocks import PRIOR_LOGIT, REG_MAX, SPP, Conv, QARepVGG, decode, dfl_output
from raydet.models.family import Adapter, Detector, Family, Preprocessing
from raydet.postprocess import PPYoloEPostPredictionCallback

STRIDES = (8, 16, 32)

_conv = partial(Conv, act=nn.ReLU)


@dataclass(frozen=True)
class Layer:
    """What the search chose for a CSP layer.

    Attributes:
        depth: number of bottlenecks.
        hidden: number of channels of the bottlenecks.
        concat: pass on the result of each bottleneck, not only of the last.
    """

    depth: int
    hidden: int
    concat: bool = False


class Bottleneck(nn.Module):
    """Two convolutions, and the input times a learned number beside them."""

    def __init__(self, channels: int, block: Any):
        super().__init__()
        self.cv1 = block(channels, channels)
        self.cv2 = block(channels, channels)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        y: Tensor = self.alpha * x + self.cv2(self.cv1(x))
        return y


class CSPLayer(nn.Module):
    """Some channels through bottlenecks, others around them (Wang et al., CSPNet, 2019)."""

    def __init__(self, in_channels: int, out_channels: int, layer: Layer, block: Any):
        super().__init__()
        self.conv1 = _conv(in_channels, layer.hidden, 1)
        self.conv2 = _conv(in_channels, layer.hidden, 1)
        self.bottlenecks = nn.ModuleList(Bottleneck(layer.hidden, block) for _ in range(layer.depth))
        self.conv3 = _conv(layer.hidden * (2 + layer.depth * layer.concat), out_channels, 1)
        self.concat = layer.concat

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H, W]."""
        steps = [self.conv1(x)]
        for bottleneck in self.bottlenecks:
            steps.append(bottleneck(steps[-1]))
        kept = steps if self.concat else steps[-1:]
        y: Tensor = self.conv3(torch.cat((*kept, self.conv2(x)), dim=1))
        return y


class Stage(nn.Module):
    """A stage of the backbone: halve the size, then a CSP layer."""

    def __init__(self, in_channels: int, out_channels: int, layer: Layer):
        super().__init__()
        self.downsample = QARepVGG(in_channels, out_channels, stride=2)
        self.blocks = CSPLayer(out_channels, out_channels, layer, QARepVGG)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H / 2, W / 2]."""
        y: Tensor = self.blocks(self.downsample(x))
        return y


class NASBackbone(nn.Module):
    """YOLO-NAS's backbone."""

    def __init__(self, layers: tuple[Layer, ...]):
        super().__init__()
        channels = (48, 96, 192, 384, 768)
        self.stem = QARepVGG(3, channels[0], stride=2)
        self.stages = nn.ModuleList(
            Stage(channels[number], channels[number + 1], layer) for number, layer in enumerate(layers)
        )
        self.context = SPP(channels[-1], channels[-1], act=nn.ReLU)
        self.out_channels = channels[1:]

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] → maps at strides 4, 8, 16 and 32."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [*maps[:-1], self.context(maps[-1])]


class UpStage(nn.Module):
    """A map, doubled in size, with one of that size and one of twice that."""

    def __init__(self, in_channels: int, skip_channels: tuple[int, int], out_channels: int, layer: Layer):
        super().__init__()
        self.reduce_skip1 = _conv(skip_channels[0], out_channels, 1)
        self.reduce_skip2 = _conv(skip_channels[1], out_channels, 1)
        self.conv = _conv(in_channels, out_channels, 1)
        self.upsample = nn.ConvTranspose2d(out_channels, out_channels, 2, stride=2)
        self.downsample = _conv(out_channels, out_channels, 3, 2)
        self.reduce_after_concat = _conv(3 * out_channels, out_channels, 1)
        self.blocks = CSPLayer(out_channels, out_channels, layer, QARepVGG)

    def forward(self, x: Tensor, same: Tensor, finer: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map before doubling, for the way back, and the result."""
        x = self.conv(x)
        skips = self.reduce_skip1(same), self.downsample(self.reduce_skip2(finer))
        return x, self.blocks(self.reduce_after_concat(torch.cat((self.upsample(x), *skips), dim=1)))


class DownStage(nn.Module):
    """A map, halved in size, with one of that size."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, layer: Layer):
        super().__init__()
        self.conv = _conv(in_channels, out_channels // 2, 3, 2)
        self.blocks = CSPLayer(out_channels // 2 + skip_channels, out_channels, layer, partial(_conv, kernel=3))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the result."""
        y: Tensor = self.blocks(torch.cat((self.conv(x), skip), dim=1))
        return y


class NASNeck(nn.Module):
    """Path aggregation over four maps: from coarse to fine, then back."""

    def __init__(self, in_channels: tuple[int, ...], layers: tuple[Layer, ...]):
        super().__init__()
        c2, c3, c4, c5 = in_channels
        p3, p4, p5 = 96, 192, 384
        self.neck1 = UpStage(c5, (c4, c3), p4, layers[0])
        self.neck2 = UpStage(p4, (c3, c2), p3, layers[1])
        self.neck3 = DownStage(p3, p3, p4, layers[2])
        self.neck4 = DownStage(p4, p4, p5, layers[3])
        self.out_channels = (p3, p4, p5)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Maps at strides 4, 8, 16 and 32 → maps at strides 8, 16 and 32."""
        c2, c3, c4, c5 = features
        skip5, x = self.neck1(c5, c4, c3)
        skip4, p3 = self.neck2(x, c3, c2)
        p4 = self.neck3(p3, skip4)
        return p3, p4, self.neck4(p4, skip5)


class NASHead(nn.Module):
    """Class logits, and box sides as distributions, for one anchor point a cell; its output is `dfl_output`'s."""

    post_prediction = PPYoloEPostPredictionCallback
    decode = staticmethod(decode)

    def __init__(self, in_channels: tuple[int, ...], num_classes: int, width: float):
        super().__init__()
        self.num_classes = num_classes
        hidden = [-(-int(channels * width) // 8) * 8 for channels in (128, 256, 512)]
        self.stems = nn.ModuleList(_conv(*channels, 1) for channels in zip(in_channels, hidden, strict=True))
        self.cls_convs = nn.ModuleList(_conv(channels, channels, 3) for channels in hidden)
        self.reg_convs = nn.ModuleList(_conv(channels, channels, 3) for channels in hidden)
        self.cls_preds = nn.ModuleList(nn.Conv2d(channels, num_classes, 1) for channels in hidden)
        self.reg_preds = nn.ModuleList(nn.Conv2d(channels, 4 * (REG_MAX + 1), 1) for channels in hidden)
        for name, parameter in self.cls_preds.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, PRIOR_LOGIT)

    def forward(self, features: tuple[Tensor, ...]) -> Any:
        """Maps at strides 8, 16 and 32 → see `dfl_output`."""
        stems = [stem(feature) for stem, feature in zip(self.stems, features, strict=True)]
        cls_maps = [self.cls_preds[level](self.cls_convs[level](x)) for level, x in enumerate(stems)]
        reg_maps = [self.reg_preds[level](self.reg_convs[level](x)) for level, x in enumerate(stems)]
        return dfl_output(cls_maps, reg_maps, STRIDES, self)


class YoloNAS(Detector):
    """YOLO-NAS; the subclasses set what the search chose."""

    backbone_layers: tuple[Layer, ...]
    neck_layers: tuple[Layer, ...]
    head_width: float

    def __init__(self, num_classes: int = 80):
        backbone = NASBackbone(self.backbone_layers)
        neck = NASNeck(backbone.out_channels, self.neck_layers)
        super().__init__(backbone, neck, NASHead(neck.out_channels, num_classes, self.head_width))


class YoloNAS_S(YoloNAS):
    """YOLO-NAS-s: 12.2 M parameters when fused."""

    backbone_layers = Layer(2, 32), Layer(3, 64), Layer(5, 96), Layer(2, 192)
    neck_layers = Layer(2, 64), Layer(2, 48), Layer(2, 64), Layer(2, 64)
    head_width = 0.5


class YoloNAS_M(YoloNAS):
    """YOLO-NAS-m: 31.9 M parameters when fused."""

    backbone_layers = Layer(2, 64, True), Layer(3, 128, True), Layer(5, 256, True), Layer(2, 384)
    neck_layers = Layer(2, 192), Layer(3, 64), Layer(2, 192), Layer(3, 256)
    head_width = 0.75


class YoloNAS_L(YoloNAS):
    """YOLO-NAS-l: 42.0 M parameters when fused."""

    backbone_layers = Layer(2, 96, True), Layer(3, 128, True), Layer(5, 256, True), Layer(2, 512, True)
    neck_layers = Layer(4, 128), Layer(4, 128), Layer(4, 128), Layer(4, 256)
    head_width = 1.0


FAMILY = Family(
    name="YOLO-NAS",
    models={"yolo_nas_s": YoloNAS_S, "yolo_nas_m": YoloNAS_M, "yolo_nas_l": YoloNAS_L},
    head=NASHead,
    losses=(PPYoloELoss,),
    preprocessing=Preprocessing(std=(255.0, 255.0, 255.0), channels="RGB", resize="pad_centre"),
    adapters=(
        Adapter(
            source="YOLO-NAS under super-gradients' names",
            licence="non-commercial use only: Deci's licence for the YOLO-NAS weights it published",
            mark=r"^heads\.head1\.",
            renames=(
                (r"\.seq\.", "."),
                (r"^backbone\.stem\.conv\.", "backbone.stem."),
                (r"^backbone\.stage1\.", "backbone.stages.0."),
                (r"^backbone\.stage2\.", "backbone.stages.1."),
                (r"^backbone\.stage3\.", "backbone.stages.2."),
                (r"^backbone\.stage4\.", "backbone.stages.3."),
                (r"^backbone\.context_module\.cv", "backbone.context.conv"),
                (r"^heads\.head1\.stem\.", "head.stems.0."),
                (r"^heads\.head2\.stem\.", "head.stems.1."),
                (r"^heads\.head3\.stem\.", "head.stems.2."),
                (r"^heads\.head1\.(cls|reg)_(conv|pred)s?(?:\.0)?\.", r"head.\1_\2s.0."),
                (r"^heads\.head2\.(cls|reg)_(conv|pred)s?(?:\.0)?\.", r"head.\1_\2s.1."),
                (r"^heads\.head3\.(cls|reg)_(conv|pred)s?(?:\.0)?\.", r"head.\1_\2s.2."),
            ),
            unused=r"\.rbr_reparam\.",
        ),
    ),
    recipe="yolo_nas_finetune",
)
