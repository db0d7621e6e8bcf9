"""Published weights: where each model's file is, how it is checked, and what may be done with it.

The input size and the thresholds of a model are those of its recipe, coco2017_{model}; its preprocessing is that of its
family.
"""

from __future__ import annotations

from dataclasses import dataclass

from raydet.errors import RaydetError, did_you_mean

_MEGVII = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0"
# SuperGradients' own host is gone. Other public projects fetch its files from here.
_SUPER_GRADIENTS = "https://d2gjn4b69gu75n.cloudfront.net/models"
_DFINE = "https://github.com/Peterande/storage/releases/download/dfinev1.0"
_DECI = "non-commercial use only, no redistribution: Deci's licence for the YOLO-NAS weights it published"
_NO_GRANT = "code Apache-2.0; no licence of the file is known: do not redistribute it"


@dataclass(frozen=True)
class Published:
    """The published weights of a model, or of its backbone.

    Attributes:
        model: name of the model in `raydet.models`.
        address: where the file is.
        sha256: SHA-256 sum of the file, in hexadecimal, or its first digits; None: no sum is known.
        size: size of the file in bytes; None: unknown.
        licence: licence of the file, as far as it is known.
        ap: AP@0.50:0.95 on COCO val2017, in percent; None for a backbone.
        measured_by: who measured the AP.
        image_size: side of the square input in pixels, at which the AP was measured.
    """

    model: str
    address: str
    sha256: str | None
    size: int | None
    licence: str
    ap: float | None = None
    measured_by: str = ""
    image_size: int = 640

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.address.rpartition("/")[2]


def _yolox(model: str, file: str, sha256: str, size: int, ap: float, image_size: int = 640) -> Published:
    return Published(
        model, f"{_MEGVII}/{file}.pth", sha256, size, "Apache-2.0 (Megvii YOLOX)", ap, "Megvii", image_size
    )


def _ppyoloe(model: str, sha256: str, ap: float) -> Published:
    return Published(model, f"{_SUPER_GRADIENTS}/{model}_coco.pth", sha256, None, _NO_GRANT, ap, "SuperGradients")


def _yolo_nas(model: str, sha256: str, size: int | None, ap: float) -> Published:
    return Published(model, f"{_SUPER_GRADIENTS}/{model}_coco.pth", sha256, size, _DECI, ap, "Deci, in FP16")


def _dfine(model: str, ap: float) -> Published:
    return Published(model, f"{_DFINE}/{model}_coco.pth", None, None, "Apache-2.0 (D-FINE)", ap, "its authors")


PUBLISHED: dict[str, Published] = {
    row.model: row
    for row in (
        _yolox(
            "yolox_n",
            "yolox_nano",
            "cd28f55fbbc1829f99d9ac9b38a16d259a22889739c8728ea877610201feff7b",
            7_694_953,
            25.8,
            416,
        ),
        _yolox(
            "yolox_t",
            "yolox_tiny",
            "9de513de589ac98bb92d3bca53b5af7b9acfa9b0bacb831f7999d0f7afaee8f0",
            40_755_013,
            32.8,
            416,
        ),
        _yolox(
            "yolox_s", "yolox_s", "f55ded7181e1b0c13285c56e7790b8f0e8f8db590fe4edb37f0b7f345c913a30", 72_089_125, 40.5
        ),
        _yolox(
            "yolox_m", "yolox_m", "60076992b32da82951c90cfa7bd6ab70eba9eda243e08b940a396f60ac2d19b6", 203_114_461, 46.9
        ),
        _yolox(
            "yolox_l", "yolox_l", "1e6b7fa6240375370b2a8a8eab9066b3cdd43fd1d0bfa8d2027fd3a51def2917", 434_357_141, 49.7
        ),
        _yolox(
            "yolox_x", "yolox_x", "5652330b6ae860043f091b8f550a60c10e1129f416edfdb65c259be6caf355cf", 793_463_373, 51.1
        ),
        _ppyoloe("ppyoloe_s", "f58a1a44bdaf66f80180346cf4548be3066fd30e742f329ee1b3a37fb4cdab28", 42.52),
        _ppyoloe("ppyoloe_m", "742978ab9eea199252ca160ff4e55546f7a78d10203511d91d0980c300d31873", 47.11),
        _ppyoloe("ppyoloe_l", "fcd6e7e36c90ef965198e1523e2978ab87e4e10ed75cc2d8a00a690e78b71a31", 49.48),
        _ppyoloe("ppyoloe_x", "ac65ea5f383eb28d69b5cf50ed124cc827f630d73d435f41eea76c3a9c0acf8e", 51.15),
        _yolo_nas("yolo_nas_s", "c1b1d9148ab8ae5d5984699547e850955ff9efccaf568c67b3d605acb4bfe1cb", 76_688_335, 47.5),
        _yolo_nas("yolo_nas_m", "b194fc7fa196f76161c6356558bedf04fb99a62325a74a36a4bec3ca8ba48250", None, 51.55),
        _yolo_nas("yolo_nas_l", "91a06beaa1ce1a651d6691e3198061da996eafc8890503238dedacbd4c392a32", None, 52.22),
        _dfine("dfine_n", 42.8),
        _dfine("dfine_s", 48.5),
        _dfine("dfine_m", 52.3),
        _dfine("dfine_l", 54.0),
        _dfine("dfine_x", 55.8),
        Published(
            "ssd_lite_mobilenet_v2",
            f"{_SUPER_GRADIENTS}/ssd_lite_mobilenet_v2_coco.pth",
            None,
            None,
            _NO_GRANT,
            21.5,
            "SuperGradients",
            320,
        ),
    )
}


def _hgnetv2(model: str, number: int) -> Published:
    return Published(model, f"{_DFINE}/PPHGNetV2_B{number}_stage1.pth", None, None, "Apache-2.0 (PaddlePaddle)")


# Backbones trained on ImageNet, from which a training begins that has no COCO weights.
BACKBONES: dict[str, Published] = {
    row.model: row
    for row in (
        _hgnetv2("dfine_n", 0),
        _hgnetv2("dfine_s", 0),
        _hgnetv2("dfine_m", 2),
        _hgnetv2("dfine_l", 4),
        _hgnetv2("dfine_x", 5),
        Published(
            "ssd_lite_mobilenet_v2",
            "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
            "b0353104",
            None,
            "BSD-3-Clause (torchvision)",
        ),
    )
}


def backbone(model: str) -> Published:
    """Return the published ImageNet weights of a model's backbone.

    Raises:
        RaydetError: none are known for this name.
    """
    if model not in BACKBONES:
        raise RaydetError(f"no backbone is published for {model}, but for {', '.join(BACKBONES)}")
    return BACKBONES[model]


def published(model: str) -> Published:
    """Return the published COCO weights of a model.

    Raises:
        RaydetError: none are known for this name.
    """
    if model not in PUBLISHED:
        raise RaydetError(
            f"no published weights are known for {model}{did_you_mean(model, PUBLISHED)}; `raydet weights` lists them"
        )
    return PUBLISHED[model]
