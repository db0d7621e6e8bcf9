"""What needs a GPU; skipped without one."""

import json

import pytest
import torch
from safetensors.torch import load_file

import raydet
from raydet.data.batch import Batch
from raydet.losses import PPYoloELoss, SSDLoss, YoloXDetectionLoss, YoloXFastDetectionLoss
from raydet.models import family_of, get
from raydet.postprocess import Candidates, YoloXPostPredictionCallback
from raydet.recipe import Train
from raydet.training.optimization import make_optimizer
from raydet.training.step import Step
from tests.unit.test_postprocess import some_candidates

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


CASES = [
    ("ssd_lite_mobilenet_v2", SSDLoss, {}),
    ("yolox_n", YoloXFastDetectionLoss, {}),
    ("yolox_n", YoloXFastDetectionLoss, {"use_l1": True, "obj_loss_fix": True, "iou_type": "giou"}),
    ("yolox_n", YoloXDetectionLoss, {}),
    ("ppyoloe_s", PPYoloELoss, {"use_static_assigner": True}),
    ("ppyoloe_s", PPYoloELoss, {"use_static_assigner": False, "use_varifocal_loss": False}),
    ("yolo_nas_s", PPYoloELoss, {"use_static_assigner": False}),
]
TARGETS = torch.tensor([[0, 1, 40.0, 40, 30, 30], [1, 2, 60.0, 50, 20, 40], [1, 0, 50.0, 50, 60, 20]])


def some_model(name):
    torch.manual_seed(0)
    return get(name, 5, image_size=(96, 96)).train()


def some_loss(model, kind, settings):
    return kind(**family_of(model).loss_arguments(model), **settings)


@pytest.mark.parametrize(("name", "kind", "settings"), CASES)
def test_a_loss_never_waits_for_the_gpu(name, kind, settings):
    model = some_model(name).cuda()
    criterion = some_loss(model, kind, settings).cuda()
    images = torch.rand(2, 3, 96, 96, device="cuda")
    targets = TARGETS.pin_memory()
    criterion(model(images), targets)[0].backward()  # once, to let CUDA set itself up
    with torch.autocast("cuda", torch.bfloat16):  # as in training
        outputs = model(images)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, components = criterion(outputs, targets)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(components).all()


@pytest.mark.parametrize("name", ["yolox_n", "ppyoloe_s", "yolo_nas_s", "ssd_lite_mobilenet_v2"])
def test_preprocessing_never_waits_for_the_gpu(name):
    preprocessing = family_of(name).preprocessing
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        preprocessing(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("name", "kind", "settings"), CASES)
def test_a_gpu_computes_what_a_cpu_does(name, kind, settings):
    """In single precision, predictions made to differ from point to point so that assignments do not hang on a bit."""
    model = some_model(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_preds." in key:
                parameter.normal_(std=0.1)
    criterion = some_loss(model, kind, settings)
    images = torch.rand(2, 3, 96, 96)
    torch.backends.cudnn.allow_tf32 = False
    results = []
    for device in ("cpu", "cuda"):
        model.zero_grad()
        loss, components = criterion.to(device)(model.to(device)(images.to(device)), TARGETS)
        loss.backward()
        predictions = [p.grad.norm().item() for key, p in model.named_parameters() if "_preds." in key]
        results.append([loss.item(), *components.tolist(), *predictions])
    torch.backends.cudnn.allow_tf32 = True
    assert results[1] == pytest.approx(results[0], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("classes", [1, 80, 1203])
def test_nms_on_a_gpu_keeps_what_it_does_on_a_cpu(classes):
    found = some_candidates(0, 3000, classes, (200_000.0,))
    callback = YoloXPostPredictionCallback(iou=0.6, max_predictions=3000)
    kept = callback.keep(Candidates(*(part.cuda() for part in found)))
    assert kept.is_cuda
    assert kept.tolist() == callback.keep(found).tolist()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_synchronised_norms_make_two_ranks_one(shapes, tmp_path):
    """Two ranks with half of the batch each learn what one with all of it does, norms included."""
    weights = []
    for workers in (1, 2):
        overrides = [f"data.root={shapes}", f"storage={tmp_path}", f"name=w{workers}", "train.epochs=1"]
        settings = [*overrides, "train.precision=fp32", "train.sync_bn=true", f"scale.num_workers={workers}"]
        result = raydet.train("demo", overrides=settings, say=lambda text: None)
        weights.append(load_file(result.checkpoint / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_in_half_precision_lower_the_loss(precision):
    model = some_model("yolox_n").cuda()
    criterion = some_loss(model, YoloXFastDetectionLoss, {}).cuda()
    settings = Train(precision=precision, lr=0.01)
    optimizer = make_optimizer(model, settings)
    step = Step(model, criterion, optimizer, settings, torch.device("cuda"), ranks=1, seed=0)
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8).pin_memory()
    batch = Batch(pixels, TARGETS.pin_memory(), torch.arange(2), torch.arange(2))
    losses = [float(step(batch, lambda images, targets: (images / 255, targets)).loss) for _ in range(30)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_training_in_half_precision_on_a_gpu(demo, precision):
    demo = [*demo, f"train.precision={precision}"]
    result = raydet.train("demo", overrides=demo, debug=True, device="cuda:0", say=lambda text: None)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]
