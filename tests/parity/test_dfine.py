"""D-FINE against the numbers of the original implementation: models, losses, denoising, post-processing, units."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from raydet import models
from raydet.boxes import cxcywh_to_xyxy
from raydet.losses import DFineLoss
from raydet.losses.base import Terms
from raydet.losses.hungarian import assign
from raydet.models.denoising import Noise, denoising_queries
from raydet.models.dfine import FAMILY
from raydet.models.dfine_decoder import anchor_boxes, sample
from raydet.models.hybrid_encoder import positions
from raydet.outputs import DFineOutput, decode_corners, distance_bins, logit, move_sides
from raydet.postprocess import DFinePostPredictionCallback

SIZES = ("n", "s", "m", "l", "x")


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden/dfine"


def ours(name):
    """Translate a name of the original; None: it is no part of the model."""
    layers = 3
    adapter = next(each for each in FAMILY.adapters if f"{layers - 1}" in each.mark)
    return next(iter(adapter.translate({name: torch.empty(0)})), None)


def filled(golden, size, double=False):
    """Return a model with the fixture's weights, the fixture and its arrays."""
    sys.path[:0] = [str(golden), str(golden.parent)]
    import dfine_weights

    spec = json.loads((golden / f"models/dfine_{size}.json").read_text())
    arrays = np.load(golden / f"models/dfine_{size}.npz")
    tensors = {name: torch.from_numpy(value) for name, value in dfine_weights.values(spec).items()}
    sizes = [len(tensors[re.sub("running_(mean|var)$", "weight", name)]) for name in spec["statistics"]]
    parts = torch.from_numpy(arrays["statistics"]).split(sizes)
    tensors |= dict(zip(spec["statistics"], parts, strict=True))
    tensors |= {"decoder.up": torch.tensor([spec["up"]]), "decoder.reg_scale": torch.tensor([spec["reg_scale"]])}
    model = models.get(f"dfine_{size}", num_queries=spec["num_queries"])
    adapter = next(each for each in FAMILY.adapters if each.knows(tensors))
    missing, unexpected = model.load_state_dict(adapter.translate(tensors), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return (model.double() if double else model).eval(), spec, arrays


def image(spec):
    import golden_weights

    return torch.from_numpy(golden_weights.image(spec["seed"], tuple(spec["shape"])))


def close(found, wanted, tolerance=1e-4):
    """Compare to the largest value; a shorter array holds values at even places."""
    found, wanted = found.detach().double().flatten().numpy(), np.asarray(wanted, np.float64).ravel()
    if len(wanted) < len(found):
        found = found[np.linspace(0, len(found) - 1, len(wanted)).astype(np.int64)]
    assert np.abs(found - wanted).max(initial=0) <= tolerance * np.abs(wanted).max(initial=1e-30)


@pytest.mark.parametrize("size", SIZES)
def test_official_names_shapes_and_parameter_counts(golden, size):
    names = json.loads((golden / "names.json").read_text())[f"dfine_{size}"]
    counts = json.loads((golden / "units.json").read_text())[f"model.{size}"]
    official = {name: torch.empty(shape) for name, shape in names.items()}
    adapter = next(each for each in FAMILY.adapters if each.knows(official))
    model = models.get(f"dfine_{size}")
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.translate(official).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == counts["parameters"]


@pytest.mark.parametrize("size", ["n", "s"])
class TestModel:
    @pytest.mark.parametrize("part", ["eval", "wide_rows_first", "large"])
    def test_outputs(self, golden, size, part):
        model, spec, arrays = filled(golden, size)
        if part not in spec:
            pytest.skip("this size has no such part")
        with torch.no_grad():
            _, raw = model(image(spec[part]["image"]))
        close(raw.logits[-1], arrays[f"{part}.pred_logits"])
        close(raw.boxes[-1], arrays[f"{part}.pred_boxes"])

    def test_fused(self, golden, size):
        model, spec, arrays = filled(golden, size)
        with torch.no_grad():
            _, raw = model.fuse()(image(spec["eval"]["image"]))
        close(raw.logits[-1], arrays["eval.pred_logits"])
        close(raw.boxes[-1], arrays["eval.pred_boxes"])

    def test_three_hundred_queries(self, golden, size):
        model, spec, arrays = filled(golden, size)
        model.head.num_queries = 300
        with torch.no_grad():
            _, raw = model(image(spec["full"]["image"]))
        boxes, wanted = raw.boxes[-1][0], torch.from_numpy(arrays["full.pred_boxes"])
        nearest = torch.cdist(wanted, boxes, p=torch.inf).min(1)
        assert nearest.values.max() < 1e-4
        best, label = raw.logits[-1][0][nearest.indices].max(1)
        close(best, arrays["full.max_logit"])
        assert label.tolist() == arrays["full.label"].tolist()

    def test_detections(self, golden, size):
        model, spec, arrays = filled(golden, size)
        with torch.no_grad():
            (boxes, scores), _ = model(image(spec["eval"]["image"]))
        found = DFinePostPredictionCallback(conf=0.0)(((boxes / 320, scores), None))
        for number, (width, height) in enumerate(arrays["post.sizes"].tolist()):
            rows = found[number][:100] * torch.tensor([width, height, width, height, 1, 1])
            close(rows[:, :5], arrays[f"post.{number}"][:, :5])
            assert rows[:, 5].tolist() == arrays[f"post.{number}"][:, 5].tolist()

    def test_training_step(self, golden, size, monkeypatch):
        model, spec, arrays = filled(golden, size)
        model.train()
        train = spec["train"]
        targets = training_input(train, arrays, monkeypatch)
        raw = model(image(train["image"]), targets)
        count, _ = train["dn_num_split"]
        for name, tensor in (
            ("pred_logits", raw.logits[-1][:, count:]),
            ("pred_boxes", raw.boxes[-1][:, count:]),
            ("pred_corners", raw.corners[-1][:, count:]),
            ("aux_outputs.0.pred_corners", raw.corners[0][:, count:]),
            ("enc_aux_outputs.0.pred_logits", raw.selected_logits),
            ("enc_aux_outputs.0.pred_boxes", raw.selected_boxes),
            ("pre_outputs.pred_boxes", raw.initial_boxes[:, count:]),
            ("dn_pre_outputs.pred_logits", raw.initial_logits[:, :count]),
            ("dn_outputs.1.pred_boxes", raw.boxes[1][:, :count]),
            ("dn_outputs.2.pred_logits", raw.logits[2][:, :count]),
        ):
            close(tensor, arrays[f"train.{name}"])
        criterion = DFineLoss(80)
        found = weighted(criterion, raw, targets)
        for name, value in train["components"].items():
            assert found.get(name, 0.0) == pytest.approx(value, rel=1e-4, abs=1e-6), name
        loss, _ = criterion(raw, targets)
        assert loss.item() == pytest.approx(train["loss"], rel=1e-5)
        close(running(model, spec), arrays["train.statistics_after"])

    def test_gradients(self, golden, size, monkeypatch):
        model, spec, arrays = filled(golden, size, double=True)
        train = spec["train"]
        targets = training_input(train, arrays, monkeypatch)
        model.train()
        maps = model.neck(model.backbone(image(train["image"]).double()))
        loss, _ = DFineLoss(80)(model.head(maps, targets.double()), targets)
        loss.backward()
        named = dict(model.named_parameters())
        for name, value in train["gradients"].items():
            parameter = named[ours(name)]
            if name not in train["gradients_of_rounding"]:
                assert parameter.grad.norm().item() == pytest.approx(value, rel=2e-3), name


def training_input(train, arrays, monkeypatch):
    """Return the targets in pixels, and let the denoising queries have the noise that theirs had."""
    side = train["image"]["shape"][-1]
    targets = torch.from_numpy(arrays["train.targets"]) * torch.tensor([1, 1, side, side, side, side])
    noise = Noise(
        *(
            torch.from_numpy(arrays[f"train.noise.{name}"].astype(kind))
            for name, kind in (("label_uniform", "f4"), ("new_label", "i8"), ("sign", "i8"), ("box_uniform", "f4"))
        )
    )
    monkeypatch.setattr(Noise, "draw", lambda *_: noise)
    return targets


def running(model, spec):
    """Return the running statistics in the fixture's order."""
    state = model.state_dict()
    return torch.cat([state[ours(name)] for name in spec["statistics"]])


def weighted(criterion, raw, targets):
    """Return each component as the original names it."""
    each, objects, counts = criterion.by_output(raw, targets)
    divisors = criterion.divisors(Terms(torch.zeros(1, 12), objects, counts))
    found = {}
    for name, sums in each.items():
        divided = sums.sum(0) / divisors[6 if name.startswith("_dn") else 0 :][:6] * torch.tensor(criterion.weights[:6])
        first = criterion.classification
        vfl, bbox, giou, fgl, matched, rest = divided.tolist()
        names = (first, "bbox", "giou", "fgl", "ddf")
        values = (vfl, bbox, giou, fgl, matched + rest)
        found |= {f"loss_{kind}{name}": value for kind, value in zip(names, values, strict=True)}
    return found


@pytest.fixture(scope="module")
def losses(golden):
    return json.loads((golden / "losses.json").read_text()), np.load(golden / "losses.npz")


CASES = (
    "full",
    "full_without_dn",
    "full_iou_weights",
    "full_mal",
    "full_mal_alpha",
    "empty",
    "empty_mal",
    "many",
    "many_mal",
    "one",
    "one_mal",
    "empty_dn",
)


def output_of(spec, arrays, case, leaf=lambda name, tensor: tensor):
    """Return a case's output; `leaf` sees each tensor of it."""
    data, dn = case["data"], case.get("dn")

    def load(name):
        return leaf(name, torch.from_numpy(arrays[f"{data}.{name}"]))

    def joined(part, layer):
        detecting = load(f"layer{layer}.{part}")
        return torch.cat((load(f"dn{layer}.{part}"), detecting), dim=1) if dn else detecting

    def initial(part):
        return torch.cat((load(f"dn_pre.{part}"), load(f"pre.{part}")), dim=1) if dn else load(f"pre.{part}")

    up, scale = torch.tensor([spec["up"]]), torch.tensor([spec["reg_scale"]])
    layers = range(spec["layers"])
    raw = DFineOutput(
        torch.stack([joined("pred_logits", layer) for layer in layers]),
        torch.stack([joined("pred_boxes", layer) for layer in layers]),
        torch.stack([joined("pred_corners", layer) for layer in layers]),
        initial("pred_logits"),
        initial("pred_boxes"),
        load("enc.pred_logits"),
        load("enc.pred_boxes"),
        distance_bins(up, scale, 33),
        scale,
        dn["groups"] if dn else 0,
        (1, 1),
    )
    base = torch.from_numpy(arrays[f"{data}.ref_points"])
    if dn:
        base = torch.cat((torch.from_numpy(arrays[f"{data}.dn_ref_points"]), base), dim=1)
    return raw, torch.from_numpy(arrays[f"{data}.targets"]), base


@pytest.mark.parametrize("name", CASES)
def test_loss(losses, name, monkeypatch):
    spec, arrays = losses
    case = spec["cases"][name]
    leaves = {}

    def leaf(name, tensor):
        return leaves.setdefault(name, tensor.requires_grad_())

    raw, targets, base = output_of(spec, arrays, case, leaf)
    # In the fixture the boxes that the distributions start from are not those of the first layer.
    bins = DFineLoss._bins
    monkeypatch.setattr(
        DFineLoss,
        "_bins",
        lambda self, raw, given, pairs, targets: bins(
            self, raw, base[:, : given.shape[1]] if given.shape[1] != 40 else base[:, -40:], pairs, targets
        ),
    )
    settings = {}
    if name.endswith(("mal", "mal_alpha")):
        settings = {"classification": "mal"}
    if name == "full_mal_alpha":
        settings |= {"mal_alpha": 0.5, "mal_gamma": 2.0}
    if name == "full_iou_weights":
        settings = {"giou_by_iou": True}
    criterion = DFineLoss(spec["num_classes"], **settings)
    found = weighted(criterion, raw, targets)
    for component, value in case["components"].items():
        assert found.get(component, 0.0) == pytest.approx(value, rel=1e-5, abs=1e-6), component
    loss, components = criterion(raw, targets)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert components[-1].item() == pytest.approx(loss.item())
    loss.backward()
    for leaf_name, value in case["gradients"].items():
        grad = leaves[leaf_name].grad
        assert (0.0 if grad is None else grad.norm().item()) == pytest.approx(value, rel=1e-4, abs=1e-7), leaf_name


@pytest.mark.parametrize("name", ["full", "many", "one"])
def test_matches_and_union(losses, name):
    spec, arrays = losses
    case = spec["cases"][name]
    raw, targets, _ = output_of(spec, arrays, {**case, "dn": None})
    outputs = {f"layer{layer}": (raw.logits[layer], raw.boxes[layer]) for layer in range(3)}
    outputs |= {"pre": (raw.initial_logits, raw.initial_boxes), "enc": (raw.selected_logits, raw.selected_boxes)}
    order = list(case["matched"])
    logits, boxes = (torch.stack([outputs[key][part] for key in order]) for part in (0, 1))
    matches, union = assign(logits, boxes, targets)
    first = [int((targets[:, 0] < number).sum()) for number in range(3)]

    def listed(pairs):
        found = []
        for number in range(3):
            mine = pairs.image == number
            found.append([pairs.query[mine].tolist(), (pairs.target[mine] - first[number]).tolist()])
        return found

    for key, pairs in zip(order, matches, strict=True):
        assert listed(pairs) == case["matched"][key], key
    assert listed(union) == case["union"]


SEEDS = torch.arange(3)  # of three images


@pytest.mark.parametrize("name", ["uneven", "few", "more_than_asked", "no_label_noise", "empty"])
def test_denoising(losses, name, monkeypatch):
    spec, arrays = losses
    case, key = spec["denoising"][name], f"denoising.{name}"
    targets = torch.from_numpy(arrays[f"{key}.targets"])
    if name == "empty":
        assert denoising_queries(targets, SEEDS, 7, 10) is None
        return
    sign = torch.from_numpy(arrays[f"{key}.noise.sign"].astype("i8"))
    relabel, label = torch.ones(sign.shape[:2]), torch.zeros(sign.shape[:2], dtype=torch.long)
    if case["label_noise_ratio"]:
        relabel = torch.from_numpy(arrays[f"{key}.noise.label_uniform"])
        label = torch.from_numpy(arrays[f"{key}.noise.new_label"].astype("i8"))
    noise = Noise(relabel, label, sign, torch.from_numpy(arrays[f"{key}.noise.box_uniform"]))
    monkeypatch.setattr(Noise, "draw", lambda *_: noise)
    made = denoising_queries(targets, SEEDS, 7, 10, positives=case["num_denoising"])
    assert made.groups == case["groups"]
    assert made.labels.tolist() == arrays[f"{key}.labels"].tolist()
    close(made.boxes, arrays[f"{key}.boxes_unact"], 1e-5)
    size = case["mask_shape"]
    mask = np.unpackbits(arrays[f"{key}.mask"], count=size[0] * size[1]).reshape(size).astype(bool)
    assert (made.blocked.numpy() == mask).all()


@pytest.mark.parametrize("name", ["coco", "few_classes", "one_class", "top_100"])
def test_post_processing(golden, name):
    case = json.loads((golden / "postprocess.json").read_text())["cases"][name]
    arrays = np.load(golden / "postprocess.npz")
    logits, boxes = (torch.from_numpy(arrays[f"{name}.{part}"]) for part in ("pred_logits", "pred_boxes"))
    callback = DFinePostPredictionCallback(conf=0.0, max_predictions=case["num_top_queries"])
    found = callback(((cxcywh_to_xyxy(boxes), logits.sigmoid()), None))
    for number, (width, height) in enumerate(arrays[f"{name}.sizes"].tolist()):
        rows = found[number] * torch.tensor([width, height, width, height, 1, 1])
        wanted = arrays[f"{name}.{number}"]
        assert rows.shape == wanted.shape
        close(rows[:, :5], wanted[:, :5], 1e-6)
        assert rows[:, 5].tolist() == wanted[:, 5].tolist()


@pytest.fixture(scope="module")
def units(golden):
    return np.load(golden / "units.npz")


@pytest.mark.parametrize("scale", [4, 8])
def test_distances_and_boxes(units, scale):
    up, reg_scale = torch.tensor([0.5]), torch.tensor([float(scale)])
    bins = distance_bins(up, reg_scale, 33)
    close(bins, units[f"weighting.{scale}"], 1e-6)
    points, corners = (torch.from_numpy(units[f"fdr.{scale}.{name}"]) for name in ("points", "corners"))
    moved = move_sides(points, torch.from_numpy(units[f"fdr.{scale}.distance"]), reg_scale)
    close(moved, units[f"fdr.{scale}.decoded"], 1e-5)
    wanted = move_sides(points, torch.from_numpy(units[f"fdr.{scale}.integral"]), reg_scale)
    close(decode_corners(corners, points, bins, reg_scale), wanted, 1e-5)


@pytest.mark.parametrize("case", ["square", "wide"])
def test_sampling(golden, units, case):
    spec = json.loads((golden / "units.json").read_text())[f"sampling.{case}"]
    maps = []
    for level, (height, width) in enumerate(spec["shapes"]):
        values = torch.from_numpy(units[f"sampling.{case}.value{level}"])
        maps.append(values.reshape(values.shape[0], -1, height, width))
    places, weights = (torch.from_numpy(units[f"sampling.{case}.{part}"]) for part in ("locations", "weights"))
    batch, queries, heads, total = weights.shape
    by_head = weights.transpose(1, 2).reshape(batch * heads, queries, total)
    found = sample(maps, places, by_head, tuple(spec["points"]))
    close(found.view(batch, -1, queries).transpose(1, 2), units[f"sampling.{case}.default"], 1e-5)


def test_positions_anchors_and_logit(units):
    close(positions(10, 10, 32, torch.device("cpu")), units["position.10x10"], 1e-5)
    close(logit(torch.from_numpy(units["inverse_sigmoid"][0])), units["inverse_sigmoid"][1], 1e-5)
    for size in SIZES:
        strides = (16, 32) if size == "n" else (8, 16, 32)
        boxes = anchor_boxes([(640 // stride,) * 2 for stride in strides], torch.device("cpu"))
        usable = ((boxes > 0.01) & (boxes < 0.99)).all(1, keepdim=True)
        found = torch.where(usable, logit(boxes), torch.inf)
        rows = np.linspace(0, len(found) - 1, 64).astype(np.int64)
        assert np.allclose(found[rows].numpy(), units[f"anchors.{size}"], rtol=1e-5)


@pytest.mark.parametrize("size", ["n", "s"])
def test_first_offsets(units, size):
    name = "6-6" if size == "n" else "3-6-3"
    layer = models.get(f"dfine_{size}").head.layers[0]
    close(layer.cross_attn.sampling_offsets.bias, units[f"initial.sampling_offsets.bias.{name}"], 1e-6)
