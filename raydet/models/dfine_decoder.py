"""D-FINE's decoder (Peng et al., 2024): queries that refine the sides of their boxes as distributions, layer by layer.

Box arithmetic is in float32 whatever the precision of the forward pass is: half precision cannot tell boxes of a few
pixels apart.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydet.boxes import cxcywh_to_xyxy
from raydet.models.blocks import PRIOR_LOGIT, Conv
from raydet.models.denoising import Denoising, denoising_queries
from raydet.outputs import DFineOutput, decode_corners, distance_bins, full, logit
from raydet.postprocess import DFinePostPredictionCallback

HEADS = 8
BINS = 33
STRIDE = 32  # of the coarsest map
_ANCHOR_SIDE = 0.05  # of an image, on the finest map; twice as much on each coarser one
_INSIDE = 0.01  # an anchor with a side, or a centre, nearer to 0 or 1 is not used
_LIMIT = 65504.0  # the largest number of half precision


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[..., first width] → [..., last width]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        y: Tensor = self.layers[-1](x)
        return y


class Sampling(nn.Module):
    """Deformable attention (Zhu et al., 2021): each head reads the maps at a few places about its query's box.

    Neither values nor the result are projected: a head reads its share of the channels.
    """

    def __init__(self, channels: int, points: tuple[int, ...]):
        super().__init__()
        self.points = points
        total = sum(points)
        self.sampling_offsets = nn.Linear(channels, HEADS * total * 2)
        self.attention_weights = nn.Linear(channels, HEADS * total)
        for parameter in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(parameter)
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
        direction = torch.stack((angle.cos(), angle.sin()), dim=1)
        direction = direction / direction.abs().amax(1, keepdim=True)
        steps = torch.cat([torch.arange(1, count + 1) for count in points])
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction[:, None] * steps[:, None]).flatten())

    def forward(self, query: Tensor, boxes: Tensor, maps: list[Tensor]) -> Tensor:
        """Queries [B, N, C], boxes [B, N, 4], maps [B, C, H, W] of each level → [B, N, C]."""
        batch, queries, channels = query.shape
        total = sum(self.points)
        offsets = full(self.sampling_offsets(query)).view(batch, queries, HEADS, total, 2)
        weights = full(self.attention_weights(query)).view(batch, queries, HEADS, total).softmax(-1)
        share = torch.cat([torch.full((count, 1), 0.5 / count, device=query.device) for count in self.points])
        places = boxes[:, :, None, None, :2] + offsets * share * boxes[:, :, None, None, 2:]
        weights = weights.transpose(1, 2).reshape(batch * HEADS, queries, total)
        return sample(maps, places, weights, self.points).view(batch, channels, queries).transpose(1, 2)


def sample(maps: list[Tensor], places: Tensor, weights: Tensor, points: tuple[int, ...]) -> Tensor:
    """Sum what maps hold at places, zeros around them.

    Args:
        maps: [B, heads · c, H, W] of each level.
        places: [B, N, heads, P, 2] x and y in shares of the map.
        weights: [B · heads, N, P].
        points: number of the P places that are of each level, in their order.

    Returns:
        [B · heads, c, N].
    """
    batch, queries, heads, total = places.shape[:4]
    grid = (2 * places - 1).transpose(1, 2).reshape(batch * heads, queries, total, 2)
    read = [
        F.grid_sample(full(level.reshape(batch * heads, -1, *level.shape[2:])), part, align_corners=False)
        for level, part in zip(maps, torch.split(grid, list(points), dim=2), strict=True)
    ]
    return (torch.cat(read, dim=3) * weights[:, None]).sum(-1)


class Gate(nn.Module):
    """Weigh two inputs against each other, channel by channel, in place of a sum."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Linear(2 * channels, 2 * channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Keep the shape [..., C]."""
        first, second = self.gate(torch.cat((a, b), dim=-1)).sigmoid().chunk(2, dim=-1)
        y: Tensor = self.norm(first * a + second * b)
        return y


class DecoderLayer(nn.Module):
    """Attention among the queries, reading of the maps, and a feed-forward network."""

    def __init__(self, channels: int, feedforward: int, points: tuple[int, ...]):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, HEADS, batch_first=True)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attn = Sampling(channels, points)
        self.gateway = Gate(channels)
        self.linear1 = nn.Linear(channels, feedforward)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm3 = nn.LayerNorm(channels)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor, place: Tensor, boxes: Tensor, maps: list[Tensor], blocked: Tensor | None) -> Tensor:
        """Queries [B, N, C], codes of their places [B, N, C], boxes [B, N, 4] → [B, N, C]."""
        query = x + place
        x = self.norm1(x + self.self_attn(query, query, x, attn_mask=blocked, need_weights=False)[0])
        x = self.gateway(x, self.cross_attn(x + place, boxes, maps))
        x = x + self.linear2(F.relu(self.linear1(x)))
        y: Tensor = self.norm3(x.clamp(-_LIMIT, _LIMIT))
        return y


class Quality(nn.Module):
    """How sure the distributions of a box are, as a number that is added to its class logits."""

    _BEST, _HIDDEN = 4, 64

    def __init__(self) -> None:
        super().__init__()
        self.reg_conf = MLP(4 * (self._BEST + 1), self._HIDDEN, 1)
        nn.init.zeros_(self.reg_conf.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.reg_conf.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, corners: Tensor) -> Tensor:
        """[B, N, 4 · bins] → [B, N, 1]."""
        best = corners.view(*corners.shape[:-1], 4, BINS).softmax(-1).topk(self._BEST, dim=-1).values
        y: Tensor = self.reg_conf(torch.cat((best, best.mean(-1, keepdim=True)), dim=-1).flatten(-2))
        return y


class Projection(nn.Module):
    """A linear layer and a norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.xavier_uniform_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [..., C]."""
        y: Tensor = self.norm(self.proj(x))
        return y


class DFineHead(nn.Module):
    """Selects positions of the maps as queries, and makes them boxes and classes.

    Training: a DFineOutput. Evaluation: ((boxes [B, Q, 4] xyxy in pixels, scores [B, Q, C] in 0..1), DFineOutput);
    while traced, boxes and scores alone.

    Args:
        in_channels: channels of the maps, from fine to coarse.
        num_classes: C.
        channels: width of the decoder.
        feedforward: width of its feed-forward networks.
        layers: number of its layers.
        points: places that a head reads of each map.
        reg_scale: length of a box's side in units of the distances.
        num_queries: Q, and no more than there are positions.
    """

    post_prediction = DFinePostPredictionCallback

    def __init__(
        self,
        in_channels: tuple[int, ...],
        num_classes: int,
        channels: int,
        feedforward: int,
        layers: int,
        points: tuple[int, ...],
        reg_scale: float,
        num_queries: int,
    ):
        super().__init__()
        self.num_classes, self.num_queries = num_classes, num_queries
        self.up = nn.Parameter(torch.tensor([0.5]), requires_grad=False)
        self.reg_scale = nn.Parameter(torch.tensor([float(reg_scale)]), requires_grad=False)
        same = set(in_channels) == {channels}
        self.input_proj = nn.ModuleList(
            nn.Identity() if same else Conv(c, channels, 1, act=nn.Identity, eps=1e-5, momentum=0.1)
            for c in in_channels
        )
        self.layers = nn.ModuleList(DecoderLayer(channels, feedforward, points) for _ in range(layers))
        self.lqe_layers = nn.ModuleList(Quality() for _ in range(layers))
        self.class_embed = nn.Embedding(num_classes + 1, channels, padding_idx=num_classes)
        self.query_pos_head = MLP(4, 2 * channels, channels)
        self.enc_output = Projection(channels)
        self.enc_bbox_head = MLP(channels, channels, channels, 4)
        self.pre_bbox_head = MLP(channels, channels, channels, 4)
        self.dec_bbox_head = nn.ModuleList(MLP(channels, channels, channels, 4 * BINS) for _ in range(layers))
        # Those of the layers, then that of the selection.
        self.cls_preds = nn.ModuleList(nn.Linear(channels, num_classes) for _ in range(layers + 1))
        for prediction in self.cls_preds:
            nn.init.constant_(prediction.bias, PRIOR_LOGIT)  # type: ignore[arg-type]
        for mlp in (self.enc_bbox_head, self.pre_bbox_head, *self.dec_bbox_head):
            nn.init.zeros_(mlp.layers[-1].weight)
            nn.init.zeros_(mlp.layers[-1].bias)
        for layer in self.query_pos_head.layers:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        if not same:
            for project in self.input_proj:
                nn.init.xavier_uniform_(project.conv.weight)  # type: ignore[union-attr, arg-type]

    def forward(
        self,
        features: list[Tensor],
        targets: Tensor | None = None,
        seeds: Tensor | None = None,
        most_objects: int | None = None,
    ) -> Any:
        """Maps from fine to coarse → see the class.

        Args:
            features: the maps.
            targets: [N, 6] image, class, cx, cy, w, h in pixels, which the denoising queries of a training are made of;
                None: there are none.
            seeds: [B] int64 on the CPU, a seed for the noise of each image; None: torch's generator gives them.
            most_objects: most objects of an image in the batch that these images are a part of; None: in these images.
        """
        height, width = (STRIDE * int(side) for side in features[-1].shape[2:])
        maps = [project(feature) for project, feature in zip(self.input_proj, features, strict=True)]
        content, reference, selected_logits, selected_boxes = self._select(maps)
        denoising = None
        if self.training:
            # A batch without objects has no use for these weights, and ranks wait for the gradient of each.
            content = content + 0.0 * self.class_embed.weight.sum()
            if targets is not None:
                shares = targets / targets.new_tensor([1, 1, width, height, width, height])
                if seeds is None:
                    seeds = torch.randint(2**62, (len(content),))
                denoising = denoising_queries(shares, seeds, self.num_classes, content.shape[1], most_objects)
        if denoising is not None:
            content = torch.cat((self.class_embed(denoising.labels).to(content.dtype), content), dim=1)
            reference = torch.cat((denoising.boxes, reference), dim=1)
        decoded = self._decode(content, reference, maps, denoising)
        distances = distance_bins(self.up, self.reg_scale, BINS)
        groups = 0 if denoising is None else denoising.groups
        size = (height, width)
        raw = DFineOutput(*decoded, selected_logits, selected_boxes, distances, self.reg_scale, groups, size)
        if self.training:
            return raw
        traced: bool = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
        return self.decode(raw)[0] if traced else self.decode(raw)

    def decode(self, raw: DFineOutput) -> tuple[tuple[Tensor, Tensor], DFineOutput]:
        """Training output → evaluation output."""
        queries, (height, width) = raw.selected_logits.shape[1], raw.image_size
        boxes = cxcywh_to_xyxy(raw.boxes[-1][:, -queries:])
        x, y = boxes[..., 0::2] * width, boxes[..., 1::2] * height
        pixels = torch.stack((x, y), dim=-1).flatten(-2)
        return (pixels, raw.logits[-1][:, -queries:].sigmoid()), raw

    def _select(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return content [B, Q, C] and reference boxes (logits) of the best positions, their logits and boxes."""
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        anchors = anchor_boxes([(level.shape[2], level.shape[3]) for level in maps], memory.device)
        usable = ((anchors > _INSIDE) & (anchors < 1 - _INSIDE)).all(1, keepdim=True)
        memory = self.enc_output(memory * usable)
        logits = full(self.cls_preds[-1](memory))
        best = logits.amax(2).topk(min(self.num_queries, logits.shape[1]), dim=1).indices

        def of_best(values: Tensor) -> Tensor:
            return values.gather(1, best[..., None].expand(-1, -1, values.shape[2]))

        content = of_best(memory)
        base = torch.where(usable, logit(anchors), torch.inf)[best]
        reference = full(self.enc_bbox_head(content)) + base
        return content.detach(), reference.detach(), of_best(logits), reference.sigmoid()

    def _decode(
        self, x: Tensor, reference: Tensor, maps: list[Tensor], denoising: Denoising | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the first five parts of a DFineOutput."""
        blocked = None if denoising is None else denoising.blocked
        distances = distance_bins(self.up, self.reg_scale, BINS)
        boxes = reference.sigmoid()
        logits: list[Tensor] = []
        refined: list[Tensor] = []
        sides: list[Tensor] = []
        before: Tensor | float = 0.0
        for number, layer in enumerate(self.layers):
            place = self.query_pos_head(boxes).clamp(-10, 10)
            x = layer(x, place, boxes, maps, blocked)
            if not number:
                initial_boxes = (full(self.pre_bbox_head(x)) + logit(boxes)).sigmoid()
                initial_logits = full(self.cls_preds[0](x))
                base = initial_boxes.detach()
            corners = full(self.dec_bbox_head[number](x + before))
            corners = corners + sides[-1] if sides else corners
            decoded = decode_corners(corners, base, distances, self.reg_scale)
            logits.append(full(self.cls_preds[number](x)) + full(self.lqe_layers[number](corners)))
            refined.append(decoded)
            sides.append(corners)
            before, boxes = x.detach(), decoded.detach()
        return torch.stack(logits), torch.stack(refined), torch.stack(sides), initial_logits, initial_boxes


def anchor_boxes(sizes: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Return a box [L, 4] = cx, cy, w, h in shares of the image about each position, row by row.

    Args:
        sizes: (height, width) of the maps, from fine to coarse.
        device: device of the result.
    """
    boxes = []
    for level, (height, width) in enumerate(sizes):
        row, column = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        side = torch.full_like(row, _ANCHOR_SIDE * 2.0**level, dtype=torch.float32)
        boxes.append(torch.stack(((column + 0.5) / width, (row + 0.5) / height, side, side), dim=-1).reshape(-1, 4))
    return torch.cat(boxes)
