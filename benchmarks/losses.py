"""What the losses cost: forward and backward of each, as a share of the model's own forward and backward.

A loss is timed on copies of a fresh model's training output, down to the gradient of these copies; the model on random
images, down to the gradient of its weights, its outputs merely summed up. Both are medians after a warm-up.

    python benchmarks/losses.py                                # all of them, a quarter of an hour on two CPU cores
    python benchmarks/losses.py --device cuda --batch 8 32 64
    python benchmarks/losses.py --models yolox_s --batch 2 --boxes 8 --repeats 2

On a CPU the model runs on a batch of 2 and its time is scaled to the batch, as a true one could take a minute; the loss
is timed on the true batch, for which the outputs are repeated. On a GPU both are timed on the true batch, the model in
bfloat16 as in training, each until the GPU is done. A loss that makes the host wait for the GPU is an error there.
Where other programs use the CPU, set OMP_NUM_THREADS=1: threads that wait for each other distort the times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raydet.losses import DetectionLoss, PPYoloELoss, SSDLoss, YoloXDetectionLoss, YoloXFastDetectionLoss
from raydet.models import family_of, get

ATSS = {"PPYoloELoss, ATSS": partial(PPYoloELoss, use_static_assigner=True)}
TASK_ALIGNED = {"PPYoloELoss, task-aligned": partial(PPYoloELoss, use_static_assigner=False)}
LOSSES: Mapping[str, Mapping[str, Callable[..., DetectionLoss]]] = {
    "ssd_lite_mobilenet_v2": {"SSDLoss": SSDLoss},
    "yolox_s": {"YoloXFastDetectionLoss": YoloXFastDetectionLoss, "YoloXDetectionLoss": YoloXDetectionLoss},
    "ppyoloe_s": {**ATSS, **TASK_ALIGNED},
    "yolo_nas_s": TASK_ALIGNED,
}
CPU_MODEL_BATCH = 2
WARM_UP = 2


def make_targets(batch: int, boxes: int, classes: int, size: int) -> Tensor:
    """Return random targets [batch · boxes, 6] on the CPU, about as large as COCO's objects, whole in the image."""
    count = batch * boxes
    side = 60 * size / 640 * torch.randn(count, 1).exp()
    aspect = (0.4 * torch.randn(count, 1)).exp()
    sizes = torch.cat((side * aspect, side / aspect), dim=1).clamp(4, size)
    centres = sizes / 2 + torch.rand(count, 2) * (size - sizes)
    image = torch.arange(batch).repeat_interleave(boxes)[:, None]
    return torch.cat((image, torch.randint(classes, (count, 1)), centres, sizes), dim=1)


def median_ms(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of a step in milliseconds, that of a GPU included."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(WARM_UP + repeats):
        wait()
        began = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[WARM_UP:])


def model_step(model: nn.Module, images: Tensor) -> list[Any]:
    """Run the model forward and backward without a loss; return its outputs."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        outputs = list(model(images))
    torch.autograd.backward([output.float().sum() for output in filter(_learns, outputs)])
    return outputs


def leaves_of(outputs: list[Any], batch: int) -> list[Any]:
    """Return copies of outputs at which gradients end, with the images repeated up to a batch."""

    def leaf(output: Tensor) -> Tensor:
        return output.detach()[torch.arange(batch, device=output.device) % len(output)].requires_grad_()

    return [leaf(output) if _learns(output) else output for output in outputs]


def loss_step(criterion: DetectionLoss, leaves: list[Any], targets: Tensor) -> None:
    """Run the loss forward and backward, down to the model's outputs."""
    for leaf in filter(_learns, leaves):
        leaf.grad = None
    criterion(leaves, targets)[0].backward()


def refuse_waiting(step: Callable[[], object]) -> None:
    """Run a step; raise RuntimeError where it makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure(name: str, size: int, batch: int, arguments: argparse.Namespace) -> list[str]:
    """Return the table's rows of a model and a batch size, saying each when it is done."""
    device, rows = torch.device(arguments.device), []
    cuda = device.type == "cuda"
    model = get(name, image_size=(size, size)).train()
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model_batch = batch if cuda else CPU_MODEL_BATCH
    images = 255 * torch.rand(model_batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    model_ms = median_ms(partial(model_step, model, images), device, arguments.repeats) * batch / model_batch
    leaves = leaves_of(model_step(model, images), batch)
    for label, kind in LOSSES[name].items():
        criterion = kind(**family_of(model).loss_arguments(model)).to(device)
        for boxes in arguments.boxes:
            targets = make_targets(batch, boxes, model.num_classes, size)
            step = partial(loss_step, criterion, leaves, targets.pin_memory() if cuda else targets)
            ms = median_ms(step, device, arguments.repeats)
            if cuda:
                refuse_waiting(step)
            rows.append(f"| {name} | {label} | {batch} | {boxes} | {ms:.1f} | {model_ms:.1f} | {ms / model_ms:.1%} |")
            print(f"{name}, {label}, batch {batch}, {boxes} boxes: {ms:.1f} ms", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="(default: %(default)s)")
    parser.add_argument("--boxes", type=int, nargs="+", default=[8, 60], help="an image (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--size", type=int, help="side of the images (default: 320 px for SSD, 640 for the others)")
    parser.add_argument("--repeats", type=int, default=10, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    rows = []
    for name in arguments.models:
        size = arguments.size or (320 if family_of(name).fixed_size else 640)
        for batch in arguments.batch:
            rows += measure(name, size, batch, arguments)
    scaled = "" if arguments.device.startswith("cuda") else f"; the model's is that of {CPU_MODEL_BATCH} images, scaled"
    print(f"Forward and backward on {arguments.device}, median of {arguments.repeats}{scaled}. Boxes: an image.\n")
    print("| model | loss | batch | boxes | loss ms | model ms | share |\n|---|---|---|---|---|---|---|")
    print(*rows, sep="\n")


def _learns(output: object) -> bool:
    return isinstance(output, Tensor) and output.requires_grad


if __name__ == "__main__":
    main()
