"""SSDLite (Sandler et al., MobileNetV2, 2018): MobileNetV2 and depthwise convolutions under SSD's default boxes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raydet.losses import SSDLoss
from raydet.models.blocks import Conv
from raydet.models.family import Adapter, Detector, Family, Preprocessing
from raydet.outputs import SSD_ASPECTS, decode_ssd, ssd_default_boxes
from raydet.postprocess import SSDPostPredictCallback

_SHAPES = 2 + 2 * len(SSD_ASPECTS)  # default boxes of a cell
_conv = partial(Conv, act=nn.ReLU6, eps=1e-5, momentum=0.1)

# MobileNetV2's stages: expansion, output channels, blocks, stride of the first.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_TAP = 14  # the block whose expanded input is the first map: the last at stride 16


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project; with a shortcut where the shape stays."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, stride: int):
        super().__init__()
        self.expand = _conv(in_channels, hidden, 1) if hidden != in_channels else nn.Identity()
        self.depthwise = _conv(hidden, hidden, 3, stride, groups=hidden)
        self.project = _conv(hidden, out_channels, 1, act=nn.Identity)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H / stride, W / stride]."""
        return self.squeeze(x, self.expand(x))

    def squeeze(self, x: Tensor, expanded: Tensor) -> Tensor:
        """Finish what `expand` began."""
        y: Tensor = self.project(self.depthwise(expanded))
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """MobileNetV2 without its classifier."""

    out_channels = (576, 1280)

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        features: list[nn.Module] = [_conv(3, channels, 3, 2)]
        for expansion, out, count, stride in _STAGES:
            for number in range(count):
                features.append(InvertedResidual(channels, channels * expansion, out, 1 if number else stride))
                channels = out
        self.features = nn.ModuleList([*features, _conv(channels, 1280, 1)])

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] → maps at strides 16 and 32."""
        x = images
        for feature in self.features[:_TAP]:
            x = feature(x)
        tap: InvertedResidual = self.features[_TAP]  # type: ignore[assignment]
        middle = tap.expand(x)
        x = tap.squeeze(x, middle)
        for feature in self.features[_TAP + 1 :]:
            x = feature(x)
        return [middle, x]


class SSDNeck(nn.Module):
    """Four more maps, each half the size of the one before."""

    def __init__(self, in_channels: Sequence[int]):
        super().__init__()
        outputs, hidden = (512, 256, 256, 64), (256, 128, 128, 64)
        inputs = (in_channels[-1], *outputs[:-1])
        self.blocks = nn.ModuleList(
            InvertedResidual(*channels, stride=2) for channels in zip(inputs, hidden, outputs, strict=True)
        )
        self.out_channels = (*in_channels, *outputs)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Two maps → six."""
        maps = list(features)
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps


class SSDHead(nn.Module):
    """Offsets and class logits of the default boxes; class 0 is the background.

    Training: (offsets [B, 4, A], logits [B, C + 1, A]). Evaluation: (decoded, the same two); decoded is [B, A, 5 + C] =
    cx, cy, w, h in pixels, the highest class probability, class probabilities without the background.
    """

    post_prediction = SSDPostPredictCallback
    background = 1  # classes of `cls_preds` before those of the data

    def __init__(self, in_channels: Sequence[int], num_classes: int, image_size: tuple[int, int]):
        super().__init__()
        self.num_classes = num_classes
        self.image_size = image_size
        self.default_boxes: Tensor
        self.register_buffer("default_boxes", ssd_default_boxes(image_size), persistent=False)

        def depthwise(channels: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            )

        last = len(in_channels) - 1  # has but a cell or a few, and plain 3x3 predictions

        def filters() -> nn.ModuleList:
            return nn.ModuleList(
                depthwise(channels) if level < last else nn.Identity() for level, channels in enumerate(in_channels)
            )

        def predictions(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Conv2d(channels, _SHAPES * outputs, 1 if level < last else 3, padding=int(level == last))
                for level, channels in enumerate(in_channels)
            )

        self.reg_convs, self.cls_convs = filters(), filters()
        self.reg_preds, self.cls_preds = predictions(4), predictions(num_classes + 1)

    def forward(self, features: list[Tensor]) -> Any:
        """Six maps → see the class."""
        offsets, logits = [], []
        for level, feature in enumerate(features):
            offsets.append(self.reg_preds[level](self.reg_convs[level](feature)).flatten(2).unflatten(1, (4, -1)))
            classes = self.cls_preds[level](self.cls_convs[level](feature)).flatten(2)
            logits.append(classes.unflatten(1, (self.num_classes + 1, -1)))
        raw = torch.cat([o.flatten(2) for o in offsets], 2), torch.cat([c.flatten(2) for c in logits], 2)
        return raw if self.training else self.decode(raw)

    def decode(self, raw: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Training output → evaluation output."""
        boxes = decode_ssd(raw[0].transpose(1, 2).float(), self.default_boxes, self.image_size)
        scores = raw[1].transpose(1, 2).float().softmax(-1)[..., 1:]
        return torch.cat((boxes, scores.amax(-1, keepdim=True), scores), dim=-1), raw


class SSDLiteMobileNetV2(Detector):
    """SSDLite on MobileNetV2: 4.71 M parameters.

    Args:
        num_classes: C.
        image_size: (height, width) of the images, for which the default boxes are made.
    """

    def __init__(self, num_classes: int = 80, image_size: tuple[int, int] = (320, 320)):
        backbone = MobileNetV2()
        neck = SSDNeck(backbone.out_channels)
        super().__init__(backbone, neck, SSDHead(neck.out_channels, num_classes, image_size))
        self.image_size = tuple(image_size)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError where the default boxes are for another size."""
        if (height, width) != self.image_size:
            wanted = "x".join(map(str, self.image_size))
            raise ValueError(
                f"images of {height}x{width} pixels: this SSD's default boxes are for {wanted}; "
                f"build it with image_size=({height}, {width})"
            )


def _loss_arguments(model: Detector) -> dict[str, Any]:
    head: SSDHead = model.head  # type: ignore[assignment]
    return {"num_classes": head.num_classes, "default_boxes": head.default_boxes, "image_size": head.image_size}


FAMILY = Family(
    name="SSD",
    models={"ssd_lite_mobilenet_v2": SSDLiteMobileNetV2},
    head=SSDHead,
    losses=(SSDLoss,),
    preprocessing=Preprocessing(),
    adapters=(
        Adapter(
            source="SSDLite under super-gradients' names",
            licence="Apache-2.0 (super-gradients)",
            mark=r"^backbone\.multi_output_backbone\.",
            renames=(
                (r"^backbone\.multi_output_backbone\.0\.", "backbone."),
                (r"^neck\.neck_blocks\.", "neck.blocks."),
                (r"^(backbone\.features\.(?:0|18))\.0\.", r"\1.conv."),
                (r"^(backbone\.features\.(?:0|18))\.1\.", r"\1.bn."),
                # The first block has no expansion, and its other parts two numbers less.
                (r"^(backbone\.features\.1)\.conv\.0\.", r"\1.depthwise.conv."),
                (r"^(backbone\.features\.1)\.conv\.1\.", r"\1.depthwise.bn."),
                (r"^(backbone\.features\.1)\.conv\.3\.", r"\1.project.conv."),
                (r"^(backbone\.features\.1)\.conv\.4\.", r"\1.project.bn."),
                (r"\.conv\.0\.(?=weight)", ".expand.conv."),
                (r"\.conv\.1\.", ".expand.bn."),
                (r"\.conv\.3\.", ".depthwise.conv."),
                (r"\.conv\.4\.", ".depthwise.bn."),
                (r"\.conv\.6\.", ".project.conv."),
                (r"\.conv\.7\.", ".project.bn."),
                (r"^heads\.loc\.", "heads.reg."),
                (r"^heads\.conf\.", "heads.cls."),
                (r"^heads\.(reg|cls)\.(\d)\.3\.", r"head.\1_preds.\2."),
                (r"^heads\.(reg|cls)\.(\d)\.(weight|bias)", r"head.\1_preds.\2.\3"),
                (r"^heads\.(reg|cls)\.(\d)\.", r"head.\1_convs.\2."),
            ),
            unused=r"^heads\.(dboxes_xy|dboxes_wh|scales|img_size)$",
        ),
        Adapter(
            source="torchvision's MobileNetV2, the backbone alone",
            licence="BSD-3-Clause (torchvision)",
            mark=r"^features\.18\.0\.",
            renames=(
                (r"^", "backbone."),
                (r"^(backbone\.features\.(?:0|18))\.0\.", r"\1.conv."),
                (r"^(backbone\.features\.(?:0|18))\.1\.", r"\1.bn."),
                # The first block has no expansion, and its other parts a number less.
                (r"^(backbone\.features\.1)\.conv\.0\.0\.", r"\1.depthwise.conv."),
                (r"^(backbone\.features\.1)\.conv\.0\.1\.", r"\1.depthwise.bn."),
                (r"^(backbone\.features\.1)\.conv\.1\.", r"\1.project.conv."),
                (r"^(backbone\.features\.1)\.conv\.2\.", r"\1.project.bn."),
                (r"\.conv\.0\.0\.", ".expand.conv."),
                (r"\.conv\.0\.1\.", ".expand.bn."),
                (r"\.conv\.1\.0\.", ".depthwise.conv."),
                (r"\.conv\.1\.1\.", ".depthwise.bn."),
                (r"\.conv\.2\.", ".project.conv."),
                (r"\.conv\.3\.", ".project.bn."),
            ),
            unused=r"^classifier\.",
            only="backbone.",
        ),
    ),
    recipe="ssd_lite_finetune",
    fixed_size=True,
    loss_arguments=_loss_arguments,
)
