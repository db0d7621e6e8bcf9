"""SuperGradients' list of a data set's transforms → settings of `augment`, and transforms of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raydet.errors import RaydetError, did_you_mean
from raydet.plugins import call, is_own, locate

if TYPE_CHECKING:
    from raydet.data.transforms import SampleTransform

# Settings of `augment` that a list decides: what it does not name is off.
_OFF: dict[str, Any] = {
    "mosaic": 0.0,
    "degrees": 0.0,
    "translate": 0.0,
    "scale": (1.0, 1.0),
    "shear": 0.0,
    "mixup": 0.0,
    "zoom_out": 0.0,
    "iou_crop": 0.0,
    "photometric": 0.0,
    "horizontal_flip": 0.0,
    "vertical_flip": 0.0,
    "rotate90": 0.0,
    "hsv": 0.0,
    "channel_swap": 0.0,
}
# They only fit images to the model, which its family's preprocessing does here.
_PREPROCESSING = (
    "DetectionImagePermute",
    "DetectionLongestMaxSize",
    "DetectionNormalize",
    "DetectionPadIfNeeded",
    "DetectionPadToSize",
    "DetectionPaddedRescale",
    "DetectionRescale",
    "DetectionStandardize",
    "DetectionTargetsFormatTransform",
)


@dataclass(frozen=True)
class TransformList:
    """What a list of transforms means here.

    Attributes:
        augment: settings of the recipe's section `augment`; empty: the list decides nothing, the recipe's hold.
        own: the user's own transforms, in their order; they are applied last.
    """

    augment: Mapping[str, Any] = field(default_factory=dict)
    own: tuple[SampleTransform, ...] = ()

    @staticmethod
    def read(transforms: Sequence[Any]) -> TransformList:
        """Read a list of names, of {name: arguments}, and of objects that are called with a sample and a generator.

        Raises:
            RaydetError: an entry or one of its arguments has no meaning here; it is named.
        """
        augment: dict[str, Any] = {}
        own: list[SampleTransform] = []
        for entry in transforms:
            if isinstance(entry, Mapping) and len(entry) == 1:
                ((name, arguments),) = entry.items()
            else:
                name, arguments = entry, {}
            if not isinstance(name, str):
                own.append(_callable(entry, type(entry).__name__))
            elif is_own(name):
                own.append(_callable(call(locate(name, "transforms"), "transforms", **(arguments or {})), name))
            elif name in _MEANINGS:
                augment |= call(_MEANINGS[name], f"transforms: {name}", **(arguments or {}))
            elif name not in _PREPROCESSING:
                raise RaydetError(
                    f"transforms: {name} has no meaning here{did_you_mean(name, (*_MEANINGS, *_PREPROCESSING))}; one "
                    "of your own is package.module:Class, see docs/own_dataset.md"
                )
        return TransformList({**_OFF, **augment} if augment else {}, tuple(own))


def _callable(transform: Any, name: str) -> SampleTransform:
    if not callable(transform):
        raise RaydetError(f"transforms: {name} cannot be called: it must take a raydet.data.Sample and a generator")
    return transform  # type: ignore[no-any-return]


def _symmetric(limits: float | Sequence[float], centre: float, name: str) -> float:
    """Return the largest change either way, of one number or of (lowest, highest)."""
    if isinstance(limits, int | float):
        return float(limits)
    low, high = limits
    if abs((low + high) / 2 - centre) > 1e-9:
        raise ValueError(f"{name} {list(limits)}: the middle of the two must be {centre:g}")
    return float(high - centre)


def _mosaic(prob: float = 1.0, input_dim: Any = None, enable_mosaic: bool = True, border_value: int = 114) -> Any:
    return {"mosaic": prob if enable_mosaic else 0.0}


def _affine(
    degrees: float | Sequence[float] = 10,
    translate: float | Sequence[float] = 0.1,
    scales: float | Sequence[float] = 0.1,
    shear: float | Sequence[float] = 10,
    target_size: Any = None,
    filter_box_candidates: bool = False,
    wh_thr: float = 2,
    ar_thr: float = 20,
    area_thr: float = 0.1,
    border_value: int = 114,
) -> Any:
    return {
        "degrees": _symmetric(degrees, 0, "degrees"),
        "translate": _symmetric(translate, 0.5, "translate"),
        "scale": (1 - scales, 1 + scales) if isinstance(scales, int | float) else tuple(scales),
        "shear": _symmetric(shear, 0, "shear"),
    }


def _mixup(
    prob: float = 1.0,
    mixup_scale: Sequence[float] = (0.5, 1.5),
    input_dim: Any = None,
    enable_mixup: bool = True,
    flip_prob: float = 0.5,
    border_value: int = 114,
) -> Any:
    return {"mixup": prob if enable_mixup else 0.0, "mixup_scale": tuple(mixup_scale)}


def _hsv(prob: float, hgain: float = 0.5, sgain: float = 0.5, vgain: float = 0.5, bgr_channels: Any = None) -> Any:
    return {"hsv": prob, "hue": int(hgain), "saturation": int(sgain), "value": int(vgain)}


def _probability(key: str, share: float = 1.0, default: float | None = None) -> Callable[..., Any]:
    def meaning(prob: float | None = default) -> Any:
        if prob is None:
            raise ValueError("prob is missing")
        return {key: share * prob}

    return meaning


_MEANINGS: dict[str, Callable[..., Any]] = {
    "DetectionMosaic": _mosaic,
    "DetectionRandomAffine": _affine,
    "DetectionMixup": _mixup,
    "DetectionHSV": _hsv,
    "DetectionHorizontalFlip": _probability("horizontal_flip"),
    "DetectionVerticalFlip": _probability("vertical_flip"),
    "DetectionRandomRotate90": _probability("rotate90", share=0.75, default=0.5),  # theirs turns by 0 degrees too
    "DetectionRGB2BGR": _probability("channel_swap", default=0.5),
}
