"""Convolutional blocks that the detectors share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raydet.outputs import DFLOutput, anchor_cells, decode_dfl


class Conv(nn.Module):
    """Convolution without bias, batch norm, activation; padded so that stride 1 keeps the size.

    Args:
        in_channels: number of channels of the input.
        out_channels: number of channels of the output.
        kernel: side of the kernel in pixels.
        stride: stride in pixels.
        groups: number of groups of channels that do not mix.
        padding: padding in pixels; None: (kernel - 1) // 2.
        act: class of the activation.
        eps: epsilon of the batch norm; the default is that of YOLOX and YOLO-NAS.
        momentum: momentum of the batch norm statistics; the default is that of YOLOX and YOLO-NAS.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
        act: type[nn.Module] = nn.SiLU,
        eps: float = 1e-3,
        momentum: float = 0.03,
    ):
        super().__init__()
        padding = (kernel - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H / stride, W / stride]."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class FrozenNorm(nn.Module):
    """A batch norm whose weights and statistics are constants, in training mode too."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [B, C, H, W]."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class DepthwiseConv(nn.Module):
    """A convolution of each channel by itself, then one of 1x1 over the channels."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.dconv = Conv(in_channels, in_channels, kernel, stride, groups=in_channels)
        self.pconv = Conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H / stride, W / stride]."""
        y: Tensor = self.pconv(self.dconv(x))
        return y


class Bottleneck(nn.Module):
    """1x1, then 3x3 convolution, with a shortcut around both where asked for."""

    def __init__(self, channels: int, shortcut: bool, spatial: type[Conv] | type[DepthwiseConv]):
        super().__init__()
        self.conv1 = Conv(channels, channels, 1)
        self.conv2 = spatial(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        y: Tensor = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class CSPLayer(nn.Module):
    """Half of the channels through bottlenecks, half around them (Wang et al., CSPNet, 2019)."""

    def __init__(
        self, in_channels: int, out_channels: int, depth: int, shortcut: bool, spatial: type[Conv] | type[DepthwiseConv]
    ):
        super().__init__()
        hidden = out_channels // 2
        self.conv1 = Conv(in_channels, hidden, 1)
        self.conv2 = Conv(in_channels, hidden, 1)
        self.conv3 = Conv(2 * hidden, out_channels, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut, spatial) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H, W]."""
        y: Tensor = self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), dim=1))
        return y


class Pyramid(nn.Module):
    """Spatial pyramid pooling: the map beside its maxima over 5, 9 and 13 pixels (He et al., 2014)."""

    def __init__(self) -> None:
        super().__init__()
        # The maximum over 9 is that over 5 of that over 5, and so on: three small pools instead of three growing ones.
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, 4 · C, H, W]."""
        over5 = self.pool(x)
        over9 = self.pool(over5)
        return torch.cat((x, over5, over9, self.pool(over9)), dim=1)


class SPP(nn.Module):
    """A pyramid between two convolutions of 1x1."""

    def __init__(self, in_channels: int, out_channels: int, act: type[nn.Module] = nn.SiLU):
        super().__init__()
        hidden = in_channels // 2
        self.conv1 = Conv(in_channels, hidden, 1, act=act)
        self.pyramid = Pyramid()
        self.conv2 = Conv(4 * hidden, out_channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H, W]."""
        y: Tensor = self.conv2(self.pyramid(self.conv1(x)))
        return y


class RepVGG(nn.Module):
    """A 3x3 and a 1x1 convolution side by side, which become one (Ding et al., RepVGG, 2021)."""

    def __init__(self, channels: int, act: type[nn.Module], eps: float, momentum: float):
        super().__init__()
        self.branch_3x3 = Conv(channels, channels, 3, act=nn.Identity, eps=eps, momentum=momentum)
        self.branch_1x1 = Conv(channels, channels, 1, act=nn.Identity, eps=eps, momentum=momentum)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        y: Tensor = self.act(self.branch_3x3(x) + self.branch_1x1(x))
        return y

    def reparametrised(self) -> nn.Module:
        """Return one convolution with the activation: the same function in evaluation mode."""
        wide = fold_norm(self.branch_3x3.conv, self.branch_3x3.bn)
        narrow = fold_norm(self.branch_1x1.conv, self.branch_1x1.bn)
        return nn.Sequential(_sum_of(wide, narrow), self.act)


class QARepVGG(nn.Module):
    """RepVGG that survives quantization: one branch has a norm, their sum has another (Chu et al., QARepVGG, 2022).

    Where stride and channels allow it, the input is a third branch.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.branch_3x3 = Conv(in_channels, out_channels, 3, stride, act=nn.Identity)
        # It sees every stride-th pixel, taken by slicing: with a stride of its own, oneDNN's kernel for channels-last
        # images crashes in the backward pass of a model's first layer (seen with torch 2.14.1 on a CPU).
        self.branch_1x1 = nn.Conv2d(in_channels, out_channels, 1)
        self.stride = stride
        self.identity = stride == 1 and in_channels == out_channels
        self.post_bn = nn.BatchNorm2d(out_channels, self.branch_3x3.bn.eps, self.branch_3x3.bn.momentum)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H / stride, W / stride]."""
        y = self.branch_3x3(x) + self.branch_1x1(x[..., :: self.stride, :: self.stride])
        result: Tensor = self.act(self.post_bn(y + x if self.identity else y))
        return result

    def reparametrised(self) -> nn.Module:
        """Return one convolution with the activation: the same function in evaluation mode."""
        conv = _sum_of(fold_norm(self.branch_3x3.conv, self.branch_3x3.bn), self.branch_1x1)
        if self.identity:
            channel = torch.arange(conv.out_channels, device=conv.weight.device)
            with torch.no_grad():
                conv.weight[channel, channel, 1, 1] += 1
        return nn.Sequential(fold_norm(conv, self.post_bn), self.act)


def activation(kind: type[nn.Module]) -> nn.Module:
    """Return an activation of a class, which writes over its input where it can."""
    return kind() if kind is nn.Identity else kind(inplace=True)


def reparametrise(model: nn.Module) -> None:
    """Replace the blocks of several branches by one convolution each, for evaluation only."""
    for name, child in list(model.named_children()):
        if isinstance(child, RepVGG | QARepVGG):
            setattr(model, name, child.reparametrised())
        else:
            reparametrise(child)


def fold_norms(model: nn.Module) -> None:
    """Fold the batch norms that follow a convolution in a `Conv` or an `nn.Sequential` into it, for evaluation only.

    Convolutions of another class, or with another padding than zeros, stay as they are, and so do other norms.
    """
    for module in list(model.modules()):
        if isinstance(module, Conv) and _can_fold(module.conv, module.bn):
            module.conv, module.bn = fold_norm(module.conv, module.bn), nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, nn.Sequential):
            for number in range(len(module) - 1):
                conv, norm = module[number], module[number + 1]
                if _can_fold(conv, norm):
                    module[number], module[number + 1] = fold_norm(conv, norm), nn.Identity()  # type: ignore[arg-type]


def _can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros"
    if isinstance(norm, FrozenNorm):
        return plain
    return plain and isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats


def fold_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d | FrozenNorm) -> nn.Conv2d:
    """Return one convolution that does what a convolution and a norm in evaluation mode do."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    fused = _with_bias(conv)
    with torch.no_grad():
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        fused.weight.copy_(conv.weight * scale[:, None, None, None])
        before = conv.bias if conv.bias is not None else torch.zeros_like(norm.running_mean)
        fused.bias.copy_((before - norm.running_mean) * scale + norm.bias)  # type: ignore[union-attr]
    return fused


def _sum_of(wide: nn.Conv2d, narrow: nn.Conv2d) -> nn.Conv2d:
    """Return a 3x3 convolution for the sum of one and a 1x1 convolution, which both have a bias."""
    assert wide.bias is not None
    assert narrow.bias is not None
    fused = _with_bias(wide)
    with torch.no_grad():
        fused.weight.copy_(wide.weight + nn.functional.pad(narrow.weight, (1, 1, 1, 1)))
        fused.bias.copy_(wide.bias + narrow.bias)  # type: ignore[union-attr]
    return fused


def _with_bias(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution of the same shape with a bias, its values unset."""
    return nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )


REG_MAX = 16  # the longest distance, in strides
PRIOR_LOGIT = -math.log((1 - 0.01) / 0.01)  # a fresh model's: nearly all points are background (Lin et al., 2017)
_ANCHOR_BOX = 5.0  # side of an anchor box, in strides


def dfl_output(
    cls_maps: Sequence[Tensor], reg_maps: Sequence[Tensor], strides: Sequence[int], module: nn.Module
) -> Any:
    """Join the maps of all levels into a head's output.

    Args:
        cls_maps: [B, C, H, W] class logits of each level.
        reg_maps: [B, 4 · (REG_MAX + 1), H, W] box logits of each level.
        strides: stride of each level, in pixels.
        module: the head, whose mode (training or evaluation) decides what is returned.

    Returns:
        In training mode the DFLOutput; in evaluation mode ((boxes [B, L, 4] xyxy in pixels, scores [B, L, C]), the
        same); while traced, boxes and scores alone.
    """
    cls_logits = torch.cat([level.flatten(2).transpose(1, 2) for level in cls_maps], dim=1)
    reg_logits = torch.cat([level.flatten(2).transpose(1, 2) for level in reg_maps], dim=1)
    sizes = [(level.shape[2], level.shape[3]) for level in cls_maps]
    cells, steps = anchor_cells(sizes, strides, cls_logits.device)
    points = (cells + 0.5) * steps
    half = steps * _ANCHOR_BOX / 2
    raw = DFLOutput(
        cls_logits,
        reg_logits,
        torch.cat((points - half, points + half), dim=1),
        points,
        [height * width for height, width in sizes],
        steps,
    )
    if module.training:
        return raw
    traced: bool = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    return decode(raw)[0] if traced else decode(raw)


def decode(raw: DFLOutput) -> tuple[tuple[Tensor, Tensor], DFLOutput]:
    """Training output → evaluation output, see `dfl_output`."""
    boxes = decode_dfl(raw.reg_logits, raw.anchor_points, raw.stride)
    return (boxes, raw.cls_logits.float().sigmoid()), raw
