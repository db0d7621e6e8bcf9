"""The first ten minutes on a GPU: does it compute what the CPU does, how fast, and what does it wait for?

Each line is one measurement with what is expected of it, and says `met`, `missed`, `failed` (with the error) or
`not run` (with the reason). Nothing is trained on a data set, and Ray is not needed.

    python -m benchmarks.gpu                            # on the first GPU, within eight minutes
    python -m benchmarks.gpu --device cpu --quick       # the same checks on small models, to try the command itself
    python -m benchmarks.gpu --models yolox_s --json yolox.json

docs/first_gpu.md says what to look at besides, and in which order.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from benchmarks.losses import make_targets, median_ms
from raydet.data.batch import Batch
from raydet.errors import RaydetError
from raydet.metrics import DetectionMetrics
from raydet.models import family_of, get
from raydet.recipe import Eval, Train
from raydet.training.optimization import EMA, make_optimizer
from raydet.training.step import Outcome, Step

MODELS = ("ssd_lite_mobilenet_v2", "yolox_s", "ppyoloe_s", "yolo_nas_s", "dfine_s")
QUICK_MODELS = ("ssd_lite_mobilenet_v2", "yolox_n", "ppyoloe_s", "yolo_nas_s", "dfine_n")
NO_CUDA = "needs CUDA"


@dataclass(frozen=True)
class Line:
    """One measurement: of which check and model, what was found, what is expected, and the verdict."""

    check: str
    subject: str
    found: str
    expected: str
    verdict: str


@dataclass
class Bench:
    """What the checks share.

    Attributes:
        device: device that is measured.
        models: models that are measured.
        quick: small models and few repeats?
        deadline: time (`time.monotonic`) from which on no check begins.
        lines: lines so far.
    """

    device: torch.device
    models: Sequence[str]
    quick: bool
    deadline: float
    lines: list[Line] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Is the device a GPU of CUDA's?"""
        return self.device.type == "cuda"

    @property
    def small_side(self) -> int:
        """Side of the images in pixels where speed is not measured."""
        return 96 if self.quick else 320

    def side_of(self, name: str) -> int:
        """Return the side of a model's images in pixels where its speed is measured."""
        return 96 if self.quick else 320 if family_of(name).fixed_size else 640

    @property
    def images(self) -> int:
        """Number of images of a speed measurement."""
        return 2 if self.quick else 64

    @property
    def repeats(self) -> int:
        """Number of times that are measured."""
        return 1 if self.quick else 20

    @property
    def backend(self) -> str:
        """What compiles; the quick one only traces."""
        return "eager" if self.quick else "inductor"

    def say(self, check: str, subject: str, found: str, expected: str, met: bool | None) -> None:
        """Print and keep a line; `met` is None where nothing could be measured."""
        self.add(Line(check, subject, found, expected, {True: "met", False: "missed", None: "not run"}[met]))

    def add(self, line: Line) -> None:
        """Print and keep a line."""
        self.lines.append(line)
        print(f"{line.verdict:8}{line.check:28}{line.subject:23}{line.found:58}{line.expected}", flush=True)

    def batch(self, count: int, side: int, classes: int = 80) -> Batch:
        """Return random images and targets, the same each time, pinned for a GPU."""
        torch.manual_seed(0)
        pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        targets = make_targets(count, 8, classes, side)
        if self.cuda:
            pixels, targets = pixels.pin_memory(), targets.pin_memory()
        return Batch(pixels, targets, torch.arange(count), torch.arange(count))


class Trained:
    """A fresh model with its loss, its optimizer and raydet's step.

    Args:
        bench: device and sizes.
        name: name of the model.
        classes: number of classes.
        side: side of the images in pixels.
        compiled: compile the model?
        channels_last: lay images and weights out in channels-last memory?
        spread: let predictions differ from point to point, so that assignments and NMS do not hang on a bit?
        **settings: section `train` of the recipe.
    """

    def __init__(
        self,
        bench: Bench,
        name: str,
        side: int,
        classes: int = 80,
        compiled: bool = False,
        channels_last: bool = True,
        spread: bool = False,
        **settings: Any,
    ):
        self.family, self.device = family_of(name), bench.device
        torch.manual_seed(0)
        queries: dict[str, Any] = {"num_queries": 30} if self.family.has_queries and bench.quick else {}
        self.model: Any = get(name, classes, image_size=(side, side), **queries).train()
        for key, parameter in self.model.named_parameters():
            if spread and "_preds." in key:
                nn.init.normal_(parameter, std=0.1)
        self.criterion: Any = self.family.losses[0](**self.family.loss_arguments(self.model)).to(self.device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(self.device).to(memory_format=layout)
        self.network: Any = self.model
        if compiled:
            self.network = torch.compile(self.model, backend=bench.backend)
        self.settings = Train(**{"lr": 1e-4, **settings})
        self.layout = layout
        self.optimizer = make_optimizer(self.model, self.settings)
        self.step = Step(self.network, self.criterion, self.optimizer, self.settings, self.device, ranks=1, seed=0)

    def prepare(self, pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Turn pixels on the device into the model's input."""
        return self.family.preprocessing(pixels).contiguous(memory_format=self.layout), targets

    def train(self, batch: Batch) -> Outcome:
        """Make raydet's step."""
        torch.manual_seed(0)  # what D-FINE draws
        return self.step(batch, self.prepare)

    def outputs(self, batch: Batch, dtype: torch.dtype = torch.float32) -> Any:
        """Run the model forward."""
        torch.manual_seed(0)
        inputs, targets = self.prepare(
            batch.images.to(self.device, non_blocking=True), batch.targets.to(self.device, non_blocking=True)
        )
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            if not (self.model.training and getattr(self.model, "takes_targets", False)):
                return self.network(inputs)
            return self.network(inputs, targets, batch.positions, int(batch.targets[:, 0].long().bincount().max()))

    def bare(self, batch: Batch, dtype: torch.dtype) -> None:
        """Make a step as a plain loop does: nothing is looked at."""
        outputs = self.outputs(batch, dtype)
        loss, _ = self.criterion(outputs, batch.targets.to(self.device, non_blocking=True))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def about_the_device(bench: Bench) -> None:
    """Name the device and what it can."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    bench.say("torch", torch.__version__, "", "2.11 or later", version >= (2, 11))
    if not bench.cuda:
        bench.say("device", str(bench.device), NO_CUDA, "bf16 without emulation, cuDNN", None)
        return
    native, capability = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_capability()
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    found = f"capability {capability[0]}.{capability[1]}, bf16 {native}, cuDNN {cudnn}"
    expected = "bf16 without emulation from capability 8.0 on"
    bench.say("device", torch.cuda.get_device_name(bench.device), found, expected, native == (capability >= (8, 0)))


def parity(bench: Bench, name: str) -> None:
    """Compare loss and gradient in single precision with the CPU's, in contiguous memory there."""
    side, found = bench.small_side, []
    with no_tf32():
        for device, last in ((torch.device("cpu"), False), (bench.device, True)):
            one = Trained(replace(bench, device=device), name, side, channels_last=last, spread=True)
            # SSDLite's last map is a single point here. The batch norm of two values has gradients that mean nothing.
            batch = bench.batch(8, side)
            loss, _ = one.criterion(one.outputs(batch), batch.targets.to(device))
            loss.backward()
            norms = [p.grad.double().norm().cpu() for p in one.model.parameters() if p.grad is not None]
            found.append((loss.item(), torch.stack(norms).norm().item()))
    for what, limit, (ours, theirs) in zip(("loss", "gradient"), (1e-3, 2e-2), zip(*found, strict=True), strict=True):
        apart = abs(theirs / ours - 1)
        bench.say(f"fp32 {what}", name, f"{theirs:.6g}, {apart:.1e} from the CPU's", f"within {limit:g}", apart < limit)


def precision(bench: Bench, name: str) -> None:
    """Compare steps in other precisions and layouts with those of single precision."""
    side = bench.small_side
    batch, steps = bench.batch(2 if bench.quick else 8, side), 1 if bench.quick else 12
    modes: dict[str, dict[str, Any]] = {
        "contiguous": {"channels_last": False},
        "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"},
    }
    if bench.quick and name != QUICK_MODELS[1]:
        del modes["fp16"]  # slow on a CPU
    base = float(Trained(bench, name, side, precision="fp32").train(batch).loss)
    for mode, settings in modes.items():
        one = Trained(bench, name, side, **{"precision": "fp32", **settings})
        outcomes = [one.train(batch) for _ in range(20 if mode == "fp16" and not bench.quick else steps)]
        apart = abs(float(outcomes[0].loss) / base - 1)
        bench.say(f"{mode} loss beside fp32", name, f"{apart:.2%} apart", "within 2 %", apart < 0.02)
        good = [outcome.finite for outcome in outcomes]
        at_start = mode == "fp16" and good == sorted(good) and (bench.quick or good[-1])
        expected = "skipped at the start only" if mode == "fp16" else "none"
        found = f"{good.count(False)} of {len(good)} steps not finite"
        bench.say(f"{mode} steps", name, found, expected, all(good) or at_start)


def output_precision(bench: Bench, name: str) -> None:
    """Say how far a fresh model's output is off in bf16; SSDLite's is 30 % on a CPU, though its loss agrees."""
    side = bench.small_side
    one, batch = Trained(bench, name, side), bench.batch(2, side)
    with torch.no_grad():
        exact, rough = (
            [tensor.float() for tensor in tensors(one.outputs(batch, dtype)) if tensor.is_floating_point()]
            for dtype in (torch.float32, torch.bfloat16)
        )
    off = max(float((b - a).norm() / a.norm().clamp(min=1e-12)) for a, b in zip(exact, rough, strict=True))
    bench.say("bf16 outputs beside fp32", name, f"{off:.1%} rms at most", "within 40 %", off < 0.4)


def waits(bench: Bench, name: str) -> None:
    """Count how often a step makes the host wait for the GPU, and the bytes of AdamW's counters on it when resumed."""
    side = bench.small_side
    batch = bench.batch(2, side)
    one = Trained(bench, name, side, optimizer="adamw", clip_grad_norm=1.0)
    one.train(batch)
    before = waits_of(bench, partial(one.train, batch))
    saved = io.BytesIO()
    torch.save(one.optimizer.state_dict(), saved)
    saved.seek(0)
    one.optimizer.load_state_dict(torch.load(saved, map_location=bench.device, weights_only=True))
    devices = {state["step"].device.type for state in one.optimizer.state.values()}
    bench.say("AdamW's counters, resumed", name, f"on {', '.join(sorted(devices))}", "on cpu", devices == {"cpu"})
    expected = "one a step, clipping and resuming add none"
    if before is None:
        bench.say("waits for the device", name, NO_CUDA, expected, None)
        return
    after = waits_of(bench, partial(one.train, batch))
    bench.say("waits for the device", name, f"{before}, resumed {after}", expected, (before, after) == (1, 1))


def detections(bench: Bench, name: str) -> None:
    """Time the post-prediction callback, and compare its detections with those on the CPU."""
    side = bench.side_of(name)
    one, batch, given = Trained(bench, name, side, spread=True), bench.batch(bench.images, side), Eval()
    one.model.eval()
    callback = one.model.get_post_prediction_callback(
        conf=given.score,
        iou=given.iou,
        max_predictions=given.max_detections,
        multi_label_per_box=given.multi_label,
        nms_top_k=given.nms_top_k,
    )
    with torch.no_grad():
        outputs = one.outputs(batch)
        forward = median_ms(lambda: one.outputs(batch), bench.device, bench.repeats)
        ms = median_ms(lambda: callback(outputs), bench.device, bench.repeats)
        here, on_cpu = callback(outputs), callback(moved(outputs, torch.device("cpu")))
    found = f"{ms:.1f} ms beside {forward:.1f} ms forward, {len(batch.images)} images"
    bench.say("post-prediction", name, found, "no slower than forward", ms <= forward)
    same = all(
        a.shape == b.shape and torch.allclose(a.cpu().float(), b.float(), rtol=1e-4, atol=1e-2)
        for a, b in zip(here, on_cpu, strict=True)
    )
    bench.say("detections on both", name, f"{sum(map(len, here))} detections", "the same as on the CPU", same)


def copies(bench: Bench) -> None:
    """Time copies of a batch to the device, pinned and not, and whether they overlap with computing."""
    expected = "pinned faster; hidden behind computing"
    if not bench.cuda:
        bench.say("copies to the device", "", NO_CUDA, expected, None)
        return
    pinned = bench.batch(bench.images, 640).images
    pageable = torch.empty_like(pinned, pin_memory=False).copy_(pinned)
    speeds = {}
    for name, pixels in (("pinned", pinned), ("pageable", pageable)):
        ms = median_ms(partial(pixels.to, bench.device, non_blocking=True), bench.device, 20)
        speeds[name] = pixels.numel() / ms / 1e6
    found = f"pinned {speeds['pinned']:.1f} GB/s, pageable {speeds['pageable']:.1f} GB/s"
    bench.say("copies to the device", "", found, "pinned faster", speeds["pinned"] > speeds["pageable"])
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    matrix = torch.randn(8192, 8192, device=bench.device)

    def compute() -> None:
        for _ in range(4):
            matrix @ matrix

    def copy() -> None:
        with torch.cuda.stream(stream):
            for _ in range(4):
                pinned.to(bench.device, non_blocking=True)

    alone = [median_ms(run, bench.device, 10) for run in (compute, copy)]

    def run_both() -> None:
        copy()
        compute()

    both = median_ms(run_both, bench.device, 10)
    found = f"computing {alone[0]:.1f} ms, copies {alone[1]:.1f} ms, both {both:.1f} ms"
    bench.say("copies beside computing", "", found, "both within 1.1 of the longer", both < 1.1 * max(alone))


def too_large(bench: Bench) -> None:
    """Train on a batch that does not fit: one line, and what fits goes on."""
    expected, name = "one line that names train.micro_batch_size; goes on", bench.models[-1]
    if not bench.cuda:
        bench.say("a batch that does not fit", name, NO_CUDA, expected, None)
        return
    one, side = Trained(bench, name, 1280), 1280
    pixels = torch.zeros(2048, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    batch = Batch(pixels, make_targets(2048, 1, 80, side), torch.arange(2048), torch.arange(2048))
    try:
        one.train(batch)
        found = "no error"
    except RaydetError as error:
        found = str(error)
    torch.cuda.empty_cache()
    goes_on = one.train(bench.batch(2, side)).finite
    met = "micro_batch_size" in found and "\n" not in found and goes_on
    bench.say("a batch that does not fit", name, found[:56], expected, met)


def overfit(bench: Bench, name: str) -> None:
    """Learn eight drawn pictures by heart in bf16."""
    side, steps, classes = (96, 6, 3) if bench.quick else (160, 300, 3)
    torch.manual_seed(0)
    targets = make_targets(8, 2, classes, side)
    pixels = torch.randint(60, 100, (8, 3, side, side), dtype=torch.uint8)
    for image, label, cx, cy, w, h in targets.tolist():
        x, y = slice(int(cx - w / 2), int(cx + w / 2) + 1), slice(int(cy - h / 2), int(cy + h / 2) + 1)
        pixels[int(image), int(label), y, x] = 250
    batch = Batch(pixels, targets, torch.arange(8), torch.arange(8))
    one = Trained(bench, name, side, classes, precision="bf16", optimizer="adamw", lr=1e-3, weight_decay=0.0)
    losses = [float(one.train(batch).loss) for _ in range(steps)]
    one.model.eval()
    with torch.no_grad():
        metrics = DetectionMetrics(classes, one.model.get_post_prediction_callback(conf=0.01, iou=0.65), iou_thres=0.5)
        metrics.update(one.outputs(batch), targets)
    found = f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {steps} steps, mAP@0.50 {metrics.compute()['mAP@0.50']:.3f}"
    fallen, mean = losses[-1] / losses[0], metrics.compute()["mAP@0.50"]
    expected = "the loss falls" if bench.quick else "the loss falls by half, mAP 0.9"
    met = fallen < 1 if bench.quick else fallen < 0.5 and mean > 0.9
    bench.say("eight pictures, bf16", name, found, expected, met)


def two_processes(bench: Bench) -> None:
    """Train two processes on the one device by gloo; their weights must stay the same."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (str(bench.device), folder), nprocs=2)  # type: ignore[no-untyped-call]
        sums = [float((Path(folder) / f"{rank}.txt").read_text()) for rank in range(2)]
    found = f"sums of the weights {sums[0]:.8g} and {sums[1]:.8g}"
    bench.say("two processes, gloo", "yolox_n", found, "the same weights", sums[0] == sums[1])


def _rank(rank: int, device: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    bench = Bench(torch.device(device), (), True, float("inf"))
    one = Trained(bench, "yolox_n", 96, precision="fp32")
    step = Step(one.model, one.criterion, one.optimizer, one.settings, one.device, ranks=2, seed=0)
    batch = bench.batch(2, 96)
    for _ in range(2):
        step(replace(batch, images=batch.images + rank), one.prepare)
    total = sum(parameter.detach().double().sum() for parameter in one.model.parameters())
    (Path(folder) / f"{rank}.txt").write_text(repr(float(total)))
    dist.destroy_process_group()


def speed(bench: Bench, name: str, compiled: bool = False) -> None:
    """Time forward, the bare step and raydet's with its moving average."""
    side = bench.side_of(name)
    one, batch = Trained(bench, name, side, compiled=compiled, precision="bf16"), bench.batch(bench.images, side)
    average = EMA(one.model, one.settings, 1000)
    how = "compiled" if compiled else "eager"

    def ours() -> None:
        one.train(batch)
        average.update(1)

    times = {}
    for what, run in (
        ("forward", lambda: one.outputs(batch, torch.bfloat16)),
        ("bare step", lambda: one.bare(batch, torch.bfloat16)),
        ("our step", ours),
    ):
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        times[what] = ms = median_ms(run, bench.device, bench.repeats)
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if bench.cuda else ""
        ratio = times["bare step"] / ms if what == "our step" else 1.0
        expected = "0.95 of the bare step or more" if what == "our step" else "finishes"
        found = f"{1000 * len(batch.images) / ms:.1f} images/s{memory}" + f", {ratio:.2f}" * (what == "our step")
        bench.say(f"{what}, {how}", name, found, expected, ratio >= 0.95)
    ms = median_ms(lambda: average.update(1), bench.device, bench.repeats)
    share = ms / times["our step"]
    bench.say(f"moving average, {how}", name, f"{ms:.2f} ms, {share:.1%} of a step", "within 3 %", share < 0.03)


def sizes(bench: Bench, name: str) -> None:
    """Train with images of 15 sizes under cudnn.benchmark: the second time round no size may be slow."""
    sides = (64, 96) if bench.quick else tuple(range(416, 865, 32))
    one = Trained(bench, name, sides[-1], precision="bf16")
    batches = [bench.batch(2 if bench.quick else 16, side) for side in sides]
    for batch in batches:
        one.train(batch)
    largest = median_ms(lambda: one.train(batches[-1]), bench.device, 1 if bench.quick else 3)
    peak = torch.cuda.max_memory_allocated() if bench.cuda else 0
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [median_ms(partial(one.train, batch), bench.device, 1) for batch in batches]
    found = f"slowest {max(times):.0f} ms, the largest size alone {largest:.0f} ms, peak {peak / 2**30:.1f} GiB"
    met = max(times) < 1.3 * largest
    bench.say(f"{len(sides)} sizes", name, found, "no size slower than 1.3 of the largest", met)


def recompiles(bench: Bench, name: str) -> None:
    """Count what multi-scale compiles anew, beside torch's limit of 8."""
    sides, graphs = ((96, 128) if bench.quick else tuple(range(416, 865, 64))), []
    one = Trained(bench, name, sides[-1])

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    one.network = torch.compile(one.model, backend=backend)
    first = 0
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for side in sides:
            one.outputs(bench.batch(2, side))
            first = first or len(graphs)
    torch._dynamo.reset()
    found = f"{len(graphs)} graphs for {len(sides)} sizes, {first} for the first"
    bench.say("compiled anew", name, found, "at most 8 times", len(graphs) <= 8 * first)


def compiled_loss(bench: Bench, name: str) -> None:
    """Compare the loss of a compiled step with an eager one."""
    side = bench.small_side
    batch = bench.batch(2, side)
    losses = [
        float(Trained(bench, name, side, compiled=compiled, precision="fp32").train(batch).loss)
        for compiled in (False, True)
    ]
    apart = abs(losses[1] / losses[0] - 1)
    bench.say("compiled loss beside eager", name, f"{apart:.2%} apart", "within 2 %", apart < 0.02)
    torch._dynamo.reset()


def waits_of(bench: Bench, run: Callable[[], object]) -> int | None:
    """Return how often the host waits for the GPU; None without one."""
    if not bench.cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@contextmanager
def no_tf32() -> Iterator[None]:
    """Let a GPU compute in single precision proper."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def tensors(outputs: Any) -> Iterator[Tensor]:
    """Give all tensors of an output."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, list | tuple):
        for output in outputs:
            yield from tensors(output)


def moved(outputs: Any, device: torch.device) -> Any:
    """Return an output on another device."""
    if isinstance(outputs, Tensor):
        return outputs.to(device)
    if isinstance(outputs, list | tuple):
        parts = [moved(output, device) for output in outputs]
        return type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)
    return outputs


def checks(bench: Bench) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Give all checks in turn: name, model, function. What takes longest comes last."""
    yield "device", "", partial(about_the_device, bench)
    for check in (parity, precision, output_precision, waits, detections):
        for name in bench.models:
            yield check.__name__, name, partial(check, bench, name)
    for once in (copies, too_large, two_processes):
        yield once.__name__, "", partial(once, bench)
    yield "overfit", "yolox_n", partial(overfit, bench, "yolox_n")
    for name in bench.models:
        yield "speed", name, partial(speed, bench, name)
    yield "sizes", "ppyoloe_s", partial(sizes, bench, "ppyoloe_s")
    yield "recompiles", "yolox_n", partial(recompiles, bench, "yolox_n")
    for name in bench.models[1:2] if bench.quick else bench.models:
        yield "compiled_loss", name, partial(compiled_loss, bench, name)
        if not bench.quick:
            yield "speed, compiled", name, partial(speed, bench, name, compiled=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks; print the table, write the JSON file, and return 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small models, few repeats")
    parser.add_argument("--models", nargs="+", help="(default: one of each family)")
    parser.add_argument("--minutes", type=float, default=7, help="no check begins after so many (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="file to write (default: %(default)s)")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    models = given.models or (QUICK_MODELS if given.quick else MODELS)
    bench = Bench(torch.device(given.device), models, given.quick, began + 60 * given.minutes)
    torch.backends.cudnn.benchmark = True
    seconds: dict[str, float] = {}
    for check, name, run in checks(bench):
        start = time.monotonic()
        if start > bench.deadline:
            bench.add(Line(check, name, f"{given.minutes:g} minutes are over", "", "not run"))
            continue
        try:
            run()
        except Exception as error:
            bench.add(Line(check, name, f"{type(error).__name__}: {error}".splitlines()[0][:200], "no error", "failed"))
        if bench.cuda:
            torch.cuda.empty_cache()
        seconds[f"{check} {name}".strip()] = round(time.monotonic() - start, 2)
    verdicts = [line.verdict for line in bench.lines]
    count = {verdict: verdicts.count(verdict) for verdict in ("met", "missed", "failed", "not run")}
    took = time.monotonic() - began
    print(", ".join(f"{number} {verdict}" for verdict, number in count.items()) + f"; {took:.0f} s")
    content = {
        "device": torch.cuda.get_device_name(bench.device) if bench.cuda else str(bench.device),
        "torch": torch.__version__,
        "quick": given.quick,
        "seconds": seconds,
        "lines": [asdict(line) for line in bench.lines],
    }
    given.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(count["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
