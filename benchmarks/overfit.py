"""Can each family learn at all? Train it from scratch on eight pictures of COCO at 320 px, and measure it on them.

    python benchmarks/overfit.py data/coco                     # all five families, half an hour on two CPU cores
    python benchmarks/overfit.py data/coco yolox_s train.lr=0.002

The eight are the first of train2017, by id, that have at least two objects and none with a side below 16 px.
Each training is `raydet train` with the recipe of the model, as anyone would run it; it should reach an AP50 of 0.9.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZE, IMAGES, MIN_SIDE = 320, 8, 16
REPEATS = 25  # each picture is listed so often, so that an epoch is more than a step
OVERRIDES = [
    f"data.image_size={SIZE}",
    "data.chunk_size=8",
    *(f"augment.{name}=0" for name in ("mosaic", "mixup", "translate", "degrees", "shear", "rotate90")),
    *(
        f"augment.{name}=0"
        for name in ("horizontal_flip", "hsv", "channel_swap", "zoom_out", "iou_crop", "photometric")
    ),
    "augment.scale=[1, 1]",
    "augment.multiscale=null",
    "train.batch_size=8",
    "train.optimizer=adamw",
    "train.lr=0.001",
    "train.weight_decay=0",
    "train.sync_bn=false",
    "train.warmup_steps=0",
    "train.warmup_epochs=0.8",
    "train.cooldown_epochs=0",
    "train.ema_decay=0.95",
    "train.ema_rise=constant",
    "eval.every=100",
]
# Epochs of 25 steps.
EPOCHS = {"ssd_lite_mobilenet_v2": 12, "yolox_s": 12, "ppyoloe_s": 12, "yolo_nas_s": 12, "dfine_s": 12}


def choose(annotations: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a COCO file's content, and its first images that fit."""
    content = json.loads(annotations.read_text())
    objects: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    chosen = []
    for image in sorted(content["images"], key=lambda image: int(image["id"])):
        scale = SIZE / max(image["width"], image["height"])
        mine = objects.get(image["id"], [])
        small = any(min(a["bbox"][2:]) * scale < MIN_SIDE or a["iscrowd"] for a in mine)
        if len(mine) >= 2 and not small:
            chosen.append({**image, "objects": mine})
    return content, chosen[:IMAGES]


def write_subset(content: dict[str, Any], chosen: list[dict[str, Any]], repeats: int, path: Path) -> None:
    """Write a COCO file of the chosen images, each so many times."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for _ in range(repeats):
        for image in chosen:
            number = len(images) + 1
            images.append({**{key: value for key, value in image.items() if key != "objects"}, "id": number})
            for annotation in image["objects"]:
                annotations.append({**annotation, "id": len(annotations) + 1, "image_id": number})
    subset = {"images": images, "annotations": annotations, "categories": content["categories"]}
    path.write_text(json.dumps(subset))


def main() -> None:
    """Train and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path, help="folder with annotations/instances_train2017.json and train2017/")
    parser.add_argument("what", nargs="*", help="models, default one of each family; and key=value overrides")
    parser.add_argument("--work", type=Path, default=Path("runs/overfit"), help="folder for the subset and the runs")
    arguments = parser.parse_intermixed_args()
    models = [word for word in arguments.what if "=" not in word] or list(EPOCHS)
    overrides = [word for word in arguments.what if "=" in word]

    arguments.work.mkdir(parents=True, exist_ok=True)
    content, chosen = choose(arguments.coco / "annotations/instances_train2017.json")
    print("images:", ", ".join(image["file_name"] for image in chosen))
    train, val = (arguments.work.resolve() / f"{split}.json" for split in ("train", "val"))
    write_subset(content, chosen, REPEATS, train)
    write_subset(content, chosen, 1, val)
    rows = []
    for model in models:
        began = time.perf_counter()
        command = [sys.executable, "-m", "raydet.cli", "train", f"coco2017_{model}", f"name={model}"]
        command += [f"storage={arguments.work}", f"data.root={arguments.coco}", f"train.epochs={EPOCHS[model]}"]
        for split, file in (("train", train), ("val", val)):
            command += [f"data.{split}_annotations={file}", f"data.{split}_images=train2017"]
        subprocess.run([*command, *OVERRIDES, *overrides], check=True)
        seconds = time.perf_counter() - began
        summary = json.loads((arguments.work / model / "summary.json").read_text())
        lines = [json.loads(line) for line in (arguments.work / model / "metrics.jsonl").read_text().splitlines()]
        metrics = summary["metrics"]
        ap50, ap = metrics["val/mAP@0.50"], metrics["val/mAP@0.50:0.95"]
        rows.append(f"| {model} | {lines[-1]['step']} | {seconds / 60:.1f} min | {ap50:.3f} | {ap:.3f} |")
    print("\n| model | steps | time | AP50 | AP |", "|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
