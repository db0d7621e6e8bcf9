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
        description="format of the data set: coco (instances_*.json), voc (Pascal VOC's XML), yolo (a txt file for "
        "each image), shards (written by raydet ingest), the name of a @register_dataset, or a class of"
        " your own, package.module:Class; auto: recognised by what root holds",
    )
    root: str = Field(
        "data/coco",
        description="folder of the data set: a path, s3://… or gs://…; the other paths of this section start from it",
    )
    train_annotations: str | None = Field(
        None,
        description="training annotations; coco: the JSON file; voc: the list of image names, such as "
        "ImageSets/Main/train.txt, or a folder of XML files; yolo: the folder or the list of images; "
        "null: where the format has them",
    )
    train_images: str | None = Field(None, description="folder of the training images; null: where the format has it")
    val_annotations: str | None = Field(
        None, description="validation annotations, given like train_annotations; null: where the format has them"
    )
    val_images: str | None = Field(None, description="folder of the validation images; null: where the format has it")
    train_params: dict[str, Any] = Field(
        {},
        description="arguments for a data set class of your own that is trained on, such as {samples_dir: images, "
        "transforms: [{DetectionMosaic: {prob: 1.0}}]}; see docs/own_dataset.md",
    )
    val_params: dict[str, Any] = Field({}, description="arguments for that class where it is validated on")
    class_inclusion_list: list[str] | None = Field(
        None,
        description="names of the classes to keep, numbered in this order; objects of other classes are left out; "
        "null: all classes",
    )
    max_num_samples: int | None = Field(
        None, ge=1, description="largest number of images to use from each split, from its beginning; null: all"
    )
    ignore_empty_annotations: bool = Field(
        False, description="leave out training images without objects; validation always uses every image"
    )
    difficult: Literal["keep", "ignore", "drop"] = Field(
        "keep",
        description="what to do with objects that VOC marks as difficult: keep (like any other object), ignore "
        "(like COCO's crowds: not trained on, and not counted as missed) or drop",
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise",
        description="what to do with an image or annotation that cannot be used: raise (stop and name it) or skip "
        "(leave it out and count it)",
    )
    max_errors: int = Field(
        100,
        ge=0,
        description="largest number of images and annotations to skip before the run stops, with on_error: skip",
    )
    max_pixels: int = Field(
        178_956_970,
        ge=1,
        description="largest image to decode, in pixels; a larger one cannot be used, because a small file may "
        "decode to more than the memory holds; the default is Pillow's limit",
    )
    shuffle_window: int = Field(
        4096,
        ge=1,
        description="number of neighbouring images that are shuffled among themselves, with format: shards; the "
        "shards are shuffled first; other formats shuffle all images",
    )
    image_size: Annotated[tuple[int, int], BeforeValidator(_image_size)] = Field(
        (640, 640),
        description="size of the model's input in pixels: one number or [height, width], multiples of 32; the model"
        " decides how images are fitted into it",
    )
    chunk_size: int = Field(
        64,
        ge=1,
        description="number of samples that one Ray Data task makes; best a multiple of the batch of one worker",
    )


class OwnTransform(BaseModel):
    """A transform of the user's own: `name`, and the arguments of its class."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str


class Augment(Section):
    """Random changes to training images."""

    mosaic: float = Field(0.0, ge=0, le=1, description="probability of a mosaic: four images joined at a random point")
    degrees: float = Field(0.0, ge=0, le=180, description="largest rotation of the affine transform, in degrees")
    translate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest shift of the affine transform, as a fraction of the image's width and height",
    )
    scale: Range = Field((1.0, 1.0), description="lowest and highest scale factor of the affine transform")
    shear: float = Field(0.0, ge=0, lt=90, description="largest shear of the affine transform, in degrees")
    mixup: float = Field(0.0, ge=0, le=1, description="probability of mixup: the mean of the image and another one")
    mixup_scale: Range = Field((0.5, 1.5), description="lowest and highest scale factor of the other image in mixup")
    zoom_out: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of a zoom-out: the image on a grey canvas of up to four times its sides; not for "
        "images that are in a mosaic",
    )
    iou_crop: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of a crop that overlaps an object by a random share; not for images that are in a "
        "mosaic",
    )
    photometric: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of each change of brightness, contrast, saturation, hue and order of the channels",
    )
    close_epochs: int = Field(
        0,
        ge=0,
        description="number of last epochs without mosaic, affine transform, mixup, zoom_out, iou_crop and photometric",
    )
    horizontal_flip: float = Field(0.5, ge=0, le=1, description="probability of a flip from left to right")
    vertical_flip: float = Field(0.0, ge=0, le=1, description="probability of a flip from top to bottom")
    rotate90: float = Field(
        0.0, ge=0, le=1, description="probability of a rotation by 90, 180 or 270 degrees; for a square image_size"
    )
    hsv: float = Field(1.0, ge=0, le=1, description="probability of a random shift of hue, saturation and value")
    hue: int = Field(5, ge=0, le=75, description="largest shift of the hue, in units of 2 degrees")
    saturation: int = Field(30, ge=0, le=255, description="largest shift of the saturation, whose range is 0 to 255")
    value: int = Field(30, ge=0, le=255, description="largest shift of the value, whose range is 0 to 255")
    channel_swap: float = Field(0.0, ge=0, le=1, description="probability of swapping the blue and red channels")
    transforms: list[OwnTransform] = Field(
        [],
        description="transforms of your own, applied to the pixels last: a list of {name: package.module:Class, "
        "argument: value}; each is called with a raydet.data.Sample and a numpy generator, and returns "
        "a Sample of the same size",
    )
    multiscale: Annotated[tuple[Side, Side] | None, BeforeValidator(in_order)] = Field(
        None,
        description="smallest and largest side, in pixels, that training batches are randomly resized to; null: "
        "always data.image_size",
    )
    multiscale_every: int = Field(1, ge=1, description="number of steps after which multiscale draws another size")
    multiscale_repeats: int = Field(
        1,
        ge=1,
        description="how often data.image_size is among the sizes that multiscale draws from; all others are once",
    )
