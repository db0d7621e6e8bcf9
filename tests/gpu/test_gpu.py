"""What needs a GPU; skipped without one."""

import json

import pytest
import torch

import raydet
from raydet.losses import YoloXDetectionLoss, YoloXFastDetectionLoss
from raydet.models import get

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("loss", [YoloXFastDetectionLoss, YoloXDetectionLoss])
def test_the_fast_loss_never_waits_for_the_gpu(loss):
    model = get("yolox_n", 5).cuda().train()
    criterion = loss(num_classes=5).cuda()
    images = torch.rand(2, 3, 96, 96, device="cuda")
    targets = torch.tensor([[0, 1, 40.0, 40, 30, 30], [1, 2, 60.0, 50, 20, 40]])
    criterion(model(images), targets)[0].backward()  # once, to let CUDA set itself up
    outputs = model(images)
    torch.cuda.synchronize()
    if loss is YoloXFastDetectionLoss:
        torch.cuda.set_sync_debug_mode("error")
    try:
        value, components = criterion(outputs, targets)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(components).all()


def test_a_gpu_computes_what_a_cpu_does():
    torch.manual_seed(0)
    model, criterion = get("yolox_n", 5).train(), YoloXFastDetectionLoss(num_classes=5)
    images = 255 * torch.rand(2, 3, 96, 96)
    targets = torch.tensor([[0, 1, 40.0, 40, 30, 30], [1, 2, 60.0, 50, 20, 40]])
    expected = criterion(model(images), targets)[0].item()
    found = criterion.cuda()(model.cuda()(images.cuda()), targets)[0].item()
    assert found == pytest.approx(expected, rel=1e-3)


def test_training_in_bf16_on_a_gpu(demo):
    result = raydet.train("demo", overrides=demo, debug=True, device="cuda:0", say=lambda text: None)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]
