"""The commands for detection: predict, batch-predict, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raydet.cli.options import Device, IoU, MaxPixels, Score, TrustCode, Verbose, say
from raydet.data.header import MAX_PIXELS
from raydet.errors import RaydetError


def predict(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, or run folder (its best checkpoint)")],
    source: Annotated[
        str, typer.Argument(help="image, folder of images, pattern, video, http(s) address, or number of a camera")
    ],
    out: Annotated[
        str, typer.Option("--out", "--save", help="folder for the pictures or the video, and detections.json")
    ] = "predictions",
    score: Score = None,
    iou: IoU = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="number of images in a batch", min=1)] = 16,
    max_pixels: MaxPixels = MAX_PIXELS,
    trust_code: TrustCode = False,
    device: Device = None,
) -> None:
    """Detect objects in images or a video, and write pictures or a video with boxes, and a COCO results JSON.

    If all file names are numbers, and no two the same, these are the image_ids, as in COCO. Otherwise images, or frames
    of a video, are numbered in order from 1; file_name says which is which. Images that cannot be read are left out and
    listed. Exit code 1 means that no image could be read.

    Example: raydet predict runs/demo photos/ --score 0.4
    """
    from raydet.predict.predictor import load, shown_score
    from raydet.predict.save import open_target, save
    from raydet.store import is_uri

    if is_uri(out):
        raise RaydetError(f"--out {out}: predict writes to a folder of this machine; batch-predict to an object store")
    target = open_target(source, Path(out), max_pixels)
    predictor = load(checkpoint, device, trust_code=trust_code)
    score = shown_score(predictor.config.thresholds) if score is None else score
    found = save(predictor.stream(target.source, score, iou, batch_size), target)
    for name, reason in found.failed.items():
        say(f"not done: {name}: {reason}")
    say(found.summary)
    if not found.images:
        raise typer.Exit(1)


def batch_predict(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, or run folder (its best checkpoint)")],
    source: Annotated[str, typer.Argument(help="folder of images: s3://…, gs://… or a path that all nodes share")],
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="folder for the detections: s3://…, gs://… or a path that all nodes share"),
    ],
    form: Annotated[
        str, typer.Option("--format", help="parquet, or coco: parquet and a COCO results JSON", metavar="FORMAT")
    ] = "parquet",
    score: Score = None,
    iou: IoU = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="number of images in a batch", min=1)] = 16,
    shard_images: Annotated[
        int,
        typer.Option(
            "--shard-images", help="number of images in a file of detections, which is lost when killed", min=1
        ),
    ] = 128,
    actors: Annotated[
        int | None,
        typer.Option(
            "--actors", help="number of models at once", show_default="one for each GPU, or else each CPU", min=1
        ),
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    trust_code: TrustCode = False,
    verbose: Verbose = False,
) -> None:
    """Detect objects in any number of images on Ray, from and to a disk or an object store.

    OUT gets Parquet files with a row for each image: boxes, scores, classes, or why the image could not be read. The
    same command again resumes where it was interrupted.

    Example: raydet batch-predict runs/demo s3://bucket/photos s3://bucket/found --format coco
    """
    from raydet.predict.on_ray import batch_predict as run

    summary = run(
        checkpoint,
        source,
        out,
        trust_code=trust_code,
        form=form,
        conf=score,
        iou=iou,
        batch_size=batch_size,
        shard_images=shard_images,
        actors=actors,
        max_pixels=max_pixels,
        verbose=verbose,
        say=say,
    )
    say(str(summary))


def export(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder, or run folder (its best checkpoint)")],
    form: Annotated[
        str, typer.Option("--format", help="format of the file; onnx is the only one so far", metavar="FORMAT")
    ] = "onnx",
    output: Annotated[
        str,
        typer.Option(
            "--output",
            help="form of the output: batch (count, boxes, scores and labels of each image) or flat ([N, 7])",
        ),
    ] = "batch",
    out: Annotated[
        str | None,
        typer.Option("--out", help="path of the file", show_default="model.onnx in the checkpoint's folder"),
    ] = None,
    score: Annotated[
        float | None,
        typer.Option("--score", help="lowest score of a detection", show_default="the checkpoint's", min=0, max=1),
    ] = None,
    iou: IoU = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a checkpoint as an ONNX file that runs without raydet: uint8 images in, detections out, NMS inside.

    It is written only if onnxruntime finds the same detections in validation images as PyTorch.

    Example: raydet export runs/demo --score 0.25 && raydet predict runs/demo/checkpoint_000012/model.onnx photos/
    """
    from raydet.predict.export import export as run

    if form != "onnx":
        raise RaydetError(f"--format {form}: it is onnx")
    written = run(checkpoint, out, trust_code=trust_code, form=output, conf=score, iou=iou, say=say)
    say(str(written))
