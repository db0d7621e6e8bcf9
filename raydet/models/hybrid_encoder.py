"""The hybrid encoder of RT-DETR (Zhao et al., 2024) as D-FINE has it: attention on the coarsest map, then a pyramid."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydet.models.blocks import Conv, RepVGG

_EPS, _MOMENTUM = 1e-5, 0.1
_conv = partial(Conv, eps=_EPS, momentum=_MOMENTUM)
_plain = partial(_conv, act=nn.Identity)


class Bottlenecks(nn.Module):
    """Some channels through re-parametrised blocks, added to a mix of all."""

    def __init__(self, in_channels: int, out_channels: int, depth: int):
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 1)
        self.conv2 = _conv(in_channels, out_channels, 1)
        self.bottlenecks = nn.Sequential(*(RepVGG(out_channels, nn.SiLU, _EPS, _MOMENTUM) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] → [B, out, H, W]."""
        y: Tensor = self.bottlenecks(self.conv1(x)) + self.conv2(x)
        return y


class Fusion(nn.Module):
    """Mix two joined maps: half of the channels pass through two rows of bottlenecks, and all stages are joined."""

    def __init__(self, hidden: int, branch: int, depth: int):
        super().__init__()
        self.cv1 = _conv(2 * hidden, 2 * hidden, 1)
        self.cv2 = nn.Sequential(Bottlenecks(hidden, branch, depth), _conv(branch, branch, 3))
        self.cv3 = nn.Sequential(Bottlenecks(branch, branch, depth), _conv(branch, branch, 3))
        self.cv4 = _conv(2 * hidden + 2 * branch, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 2 · hidden, H, W] → [B, hidden, H, W]."""
        x = self.cv1(x)
        second = self.cv2(x.chunk(2, dim=1)[1])
        y: Tensor = self.cv4(torch.cat((x, second, self.cv3(second)), dim=1))
        return y


class SelfAttention(nn.Module):
    """A transformer layer over the positions of one map; norms follow the sums."""

    def __init__(self, hidden: int, feedforward: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(hidden, 8, batch_first=True)
        self.linear1 = nn.Linear(hidden, feedforward)
        self.linear2 = nn.Linear(feedforward, hidden)
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [B, C, H, W]."""
        height, width = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        query = tokens + positions(height, width, x.shape[1], x.device)
        tokens = self.norm1(tokens + self.self_attn(query, query, tokens, need_weights=False)[0])
        tokens = self.norm2(tokens + self.linear2(F.gelu(self.linear1(tokens))))
        y: Tensor = tokens.transpose(1, 2).reshape(x.shape)
        return y


def positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Return the code [H · W, C] of the positions, row by row: sines and cosines of the row, then of the column."""
    frequencies = 10000.0 ** -(torch.arange(channels // 4, device=device) / (channels // 4))
    row, column = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (row, column)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


class HybridEncoder(nn.Module):
    """The neck.

    Args:
        in_channels: channels of the maps, from fine to coarse.
        hidden: channels of the results.
        feedforward: width of the transformer layer.
        branch: channels of the bottlenecks.
        depth: bottlenecks in a row.
    """

    def __init__(self, in_channels: tuple[int, ...], hidden: int, feedforward: int, branch: int, depth: int):
        super().__init__()
        steps = range(len(in_channels) - 1)
        self.input_proj = nn.ModuleList(_plain(channels, hidden, 1) for channels in in_channels)
        self.aifi = SelfAttention(hidden, feedforward)
        self.lateral_convs = nn.ModuleList(_plain(hidden, hidden, 1) for _ in steps)
        self.fpn_blocks = nn.ModuleList(Fusion(hidden, branch, depth) for _ in steps)
        self.downsample_convs = nn.ModuleList(
            nn.Sequential(_plain(hidden, hidden, 1), _plain(hidden, hidden, 3, 2, groups=hidden)) for _ in steps
        )
        self.pan_blocks = nn.ModuleList(Fusion(hidden, branch, depth) for _ in steps)
        self.out_channels = (hidden,) * len(in_channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps from fine to coarse → maps of the same sizes."""
        maps = [project(feature) for project, feature in zip(self.input_proj, features, strict=True)]
        down = [self.aifi(maps[-1])]  # from coarse to fine
        for step, finer in enumerate(reversed(maps[:-1])):
            down[-1] = self.lateral_convs[step](down[-1])
            above = F.interpolate(down[-1], scale_factor=2.0)
            down.append(self.fpn_blocks[step](torch.cat((above, finer), dim=1)))
        up = [down.pop()]
        for step, coarser in enumerate(reversed(down)):
            below = self.downsample_convs[step](up[-1])
            up.append(self.pan_blocks[step](torch.cat((below, coarser), dim=1)))
        return up
