"""The sections of what is trained on: data and augment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from raydet.recipe.section import Range, Section, Side, in_order


def _image_size(value: Any) -> Any:
    sides = [value, value] if isinstance(value, int) else value
    if isinstance(sides, list | tuple) and any(isinstance(side, int) and (side <= 0 or side % 32) for side in sides):
        raise ValueError("each side must be a positive multiple of 32")
    return sides


class Data(Section):
    """The images and their annotations."""

    format: str = Field(
        "auto",
        description="coco (instances_*.json), voc (Pascal VOC's XML), yolo (a txt an image), shards (raydet ingest's), "
        "the name of a @register_dataset, or package.module:Class, yours; auto: seen from what root holds",
    )
    root: str = Field(
        "data/coco", description="folder that the other paths of this section start from: a path, s3://… or gs://…"
    )
    train_annotations: str | None = Field(
        None,
        description="what to train on: coco: the annotation file; voc: the list of names, such as "
        "ImageSets/Main/train.txt, or a folder of XML files; yolo: the folder or list of images; null: where the "
        "format has it",
    )
    train_images: str | None = Field(None, description="folder of its images; null: where the format has it")
    val_annotations: str | None = Field(None, description="what to validate on, as train_annotations")
    val_images: str | None = Field(None, description="folder of its images; null: where the format has it")
    class_inclusion_list: list[str] | None = Field(
        None, description="classes to keep, numbered in this order; objects of others are left out; null: all"
    )
    max_num_samples: int | None = Field(None, ge=1, description="the first so many images of each split; null: all")
    ignore_empty_annotations: bool = Field(
        False, description="do not train on images without objects; validation always has every image"
    )
    difficult: Literal["keep", "ignore", "drop"] = Field(
        "keep",
        description="objects that VOC calls difficult: keep as any other, ignore as COCO's crowds (not trained on, no "
        "miss when not found), or drop",
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise", description="a record or image that cannot be used: stop and name it, or leave it out and count it"
    )
    max_errors: int = Field(100, ge=0, description="with on_error: skip, the most that are left out before it stops")
    max_pixels: int = Field(
        178_956_970,
        ge=1,
        description="pixels of the largest image that is decoded; the default is Pillow's limit. A larger image is a "
        "record that cannot be used: a small file may decode to more than the memory holds",
    )
    shuffle_window: int = Field(
        4096,
        ge=1,
        description="of format: shards: shards are shuffled, then the images within so many neighbours; other formats "
        "shuffle all images",
    )
    image_size: Annotated[tuple[int, int], BeforeValidator(_image_size)] = Field(
        (640, 640),
        description="pixels, one number or [height, width], multiples of 32; images are fitted in as the model expects",
    )
    chunk_size: int = Field(
        64, ge=1, description="samples that a Ray Data task makes; a worker's batch should divide it"
    )


class OwnTransform(BaseModel):
    """A transform of the user's own: `name`, and the arguments of its class."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str


class Augment(Section):
    """Random changes to training images."""

    mosaic: float = Field(0.0, ge=0, le=1, description="probability of four images as one, about a random point")
    degrees: float = Field(0.0, ge=0, le=180, description="affine: largest rotation")
    translate: float = Field(0.0, ge=0, le=1, description="affine: largest shift, as a share of the image's sides")
    scale: Range = Field((1.0, 1.0), description="affine: lowest and highest factor of size")
    shear: float = Field(0.0, ge=0, lt=90, description="affine: largest shear, in degrees")
    mixup: float = Field(0.0, ge=0, le=1, description="probability of the mean with another image")
    mixup_scale: Range = Field((0.5, 1.5), description="lowest and highest factor of the other image's size")
    close_epochs: int = Field(0, ge=0, description="epochs at the end without mosaic, affine and mixup")
    horizontal_flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring left and right")
    vertical_flip: float = Field(0.0, ge=0, le=1, description="probability of mirroring top and bottom")
    rotate90: float = Field(
        0.0, ge=0, le=1, description="probability of a turn by 90, 180 or 270 degrees; for square inputs"
    )
    hsv: float = Field(1.0, ge=0, le=1, description="probability of shifting hue, saturation and value")
    hue: int = Field(5, ge=0, le=75, description="largest shift of hue, in units of 2 degrees")
    saturation: int = Field(30, ge=0, le=255, description="largest shift of saturation, of 255")
    value: int = Field(30, ge=0, le=255, description="largest shift of value, of 255")
    channel_swap: float = Field(0.0, ge=0, le=1, description="probability of exchanging blue and red")
    transforms: list[OwnTransform] = Field(
        [],
        description="yours, applied to the pixels last: {name: package.module:Class, and its arguments}; called with a "
        "raydet.data.Sample and a numpy generator, it returns a Sample of the same size",
    )
    multiscale: Annotated[tuple[Side, Side] | None, BeforeValidator(in_order)] = Field(
        None, description="lowest and highest side in pixels that batches are resized to; null: data.image_size"
    )
    multiscale_every: int = Field(1, ge=1, description="steps from one such size to the next")
