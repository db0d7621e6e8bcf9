"""D-FINE (Peng et al., ICLR 2025): HGNetv2, a hybrid encoder and a decoder of queries, without NMS, in five sizes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from raydet.losses import DFineLoss
from raydet.models.dfine_decoder import DFineHead
from raydet.models.family import Adapter, Detector, Family, Preprocessing
from raydet.models.hgnetv2 import HGNetv2
from raydet.models.hybrid_encoder import HybridEncoder


class DFine(Detector):
    """D-FINE; the subclasses set the size. Input: RGB, 0..1.

    Args:
        num_classes: classes to tell apart.
        num_queries: most boxes of an image; it may be changed on trained weights.
    """

    takes_targets = True
    backbone_size: ClassVar[str]
    encoder: ClassVar[tuple[int, int, int, int]]  # channels, feed-forward, branch, depth
    decoder: ClassVar[tuple[int, int, int]] = (256, 1024, 6)  # channels, feed-forward, layers
    points: ClassVar[tuple[int, ...]] = (3, 6, 3)
    reg_scale: ClassVar[float] = 4.0
    large: ClassVar[bool] = False  # no affine maps in the backbone, its norms and stem are constants

    def __init__(self, num_classes: int = 80, num_queries: int = 300):
        backbone = HGNetv2(self.backbone_size, len(self.points), affine=not self.large, frozen=self.large)
        neck = HybridEncoder(backbone.out_channels, *self.encoder)
        head = DFineHead(
            neck.out_channels, num_classes, *self.decoder, self.points, self.reg_scale, num_queries=num_queries
        )
        super().__init__(backbone, neck, head)

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        seeds: Tensor | None = None,
        most_objects: int | None = None,
    ) -> Any:
        """Detect in preprocessed images, float [B, 3, H, W].

        Args:
            images: the images.
            targets: [N, 6] image, class, cx, cy, w, h in pixels: in training, objects to make denoising queries of.
            seeds: [B] int64 on the CPU, a seed for the noise of each image; None: torch's generator gives them.
            most_objects: most objects of an image in the batch that these images are a part of; None: in these images.

        Raises:
            ValueError: a side is no multiple of 32.
        """
        self.check_size(images.shape[-2], images.shape[-1])
        return self.head(self.neck(self.backbone(images)), targets, seeds, most_objects)


class DFine_N(DFine):
    """D-FINE-N: 3.78 M parameters, strides 16 and 32."""

    backbone_size, encoder, decoder, points = "B0", (128, 512, 21, 2), (128, 512, 3), (6, 6)


class DFine_S(DFine):
    """D-FINE-S: 10.3 M parameters."""

    backbone_size, encoder, decoder = "B0", (256, 1024, 64, 1), (256, 1024, 3)


class DFine_M(DFine):
    """D-FINE-M: 19.6 M parameters."""

    backbone_size, encoder, decoder = "B2", (256, 1024, 128, 2), (256, 1024, 4)


class DFine_L(DFine):
    """D-FINE-L: 31.2 M parameters."""

    backbone_size, encoder, large = "B4", (256, 1024, 128, 3), True


class DFine_X(DFine):
    """D-FINE-X: 62.6 M parameters."""

    backbone_size, encoder, reg_scale, large = "B5", (384, 2048, 192, 3), 8.0, True


_RENAMES = (
    (r"^encoder\.encoder\.0\.layers\.0\.", "neck.aifi."),
    (r"^encoder\.", "neck."),
    (r"^decoder\.(decoder\.)?", "head."),
    (r"^(neck\..*|head\.input_proj\.\d)\.norm\.", r"\1.bn."),
    (r"\.bottlenecks\.(\d+)\.conv1\.", r".bottlenecks.\1.branch_3x3."),
    (r"\.bottlenecks\.(\d+)\.conv2\.", r".bottlenecks.\1.branch_1x1."),
    (r"\.downsample_convs\.(\d)\.0\.cv1\.", r".downsample_convs.\1.0."),
    (r"\.downsample_convs\.(\d)\.0\.cv2\.", r".downsample_convs.\1.1."),
    (r"\.dec_score_head\.", ".cls_preds."),
    (r"\.denoising_class_embed\.", ".class_embed."),
)
# Copies of `up` and `reg_scale`, and what follows from the size of the images.
_UNUSED = r"^decoder\.decoder\.(up|reg_scale)$|^decoder\.(anchors|valid_mask)$|\.num_points_scale$"


def _adapter(layers: int) -> Adapter:
    """Return the adapter for files of so many decoder layers: the classes of the selection are numbered after them."""
    return Adapter(
        source="D-FINE under its own names",
        licence="Apache-2.0 (D-FINE); not cleared for files derived from Objects365, which is for academic use",
        mark=rf"^decoder\.dec_score_head\.{layers - 1}\.",
        renames=(*_RENAMES, (r"\.enc_score_head\.", f".cls_preds.{layers}.")),
        unused=_UNUSED,
    )


FAMILY = Family(
    name="D-FINE",
    models={"dfine_n": DFine_N, "dfine_s": DFine_S, "dfine_m": DFine_M, "dfine_l": DFine_L, "dfine_x": DFine_X},
    head=DFineHead,
    losses=(DFineLoss,),
    preprocessing=Preprocessing(std=(255.0, 255.0, 255.0), channels="RGB", resize="stretch"),
    adapters=(
        *(_adapter(layers) for layers in (6, 4, 3)),
        Adapter(
            source="HGNetv2, D-FINE's backbone alone",
            licence="Apache-2.0 (PaddlePaddle)",
            mark=r"^stem\.stem1\.conv\.",
            renames=((r"^", "backbone."),),
            only="backbone.",
        ),
    ),
    recipe="dfine_finetune",
    has_queries=True,
)
