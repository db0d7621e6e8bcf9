"""Convolutional blocks that the detectors share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    """Convolution without bias, batch norm, SiLU; padded so that stride 1 keeps the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        padding: int | None = None,
    ):
        super().__init__()
        padding = (kernel - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H / stride, W / stride]."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


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


class SPP(nn.Module):
    """Spatial pyramid pooling: the map beside its maxima over 5, 9 and 13 pixels (He et al., 2014)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        hidden = in_channels // 2
        self.conv1 = Conv(in_channels, hidden, 1)
        self.conv2 = Conv(4 * hidden, out_channels, 1)
        # The maximum over 9 is that over 5 of that over 5, and so on: three small pools instead of three growing ones.
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H, W]."""
        x = self.conv1(x)
        over5 = self.pool(x)
        over9 = self.pool(over5)
        y: Tensor = self.conv2(torch.cat((x, over5, over9, self.pool(over9)), dim=1))
        return y
