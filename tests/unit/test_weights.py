"""Checkpoints of other projects, and raydet's own."""

import contextlib
import json
import os
import re
import shutil
from argparse import Namespace
from collections import UserList

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raydet import models
from raydet.errors import RaydetError

SMALL = ["ssd_lite_mobilenet_v2", "yolox_n", "ppyoloe_s", "yolo_nas_s"]
C = 5


@pytest.fixture(scope="module")
def zoo():
    """The smallest model of each family; what it makes of an image differs by class."""
    torch.manual_seed(0)
    found = {name: models.get(name, C) for name in SMALL}
    for model in found.values():
        for parameter in model.head.cls_preds.parameters():
            nn.init.normal_(parameter, std=0.1)
    return found


@pytest.mark.parametrize("name", SMALL)
def test_weights_come_back(zoo, name, tmp_path):
    save_file(zoo[name].state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", (tmp_path / "model.safetensors").as_uri()):
        again = models.get(name, C, weights=path)
        assert all(torch.equal(a, b) for a, b in zip(zoo[name].parameters(), again.parameters(), strict=True))


def test_the_moving_average_goes_before_the_weights_of_the_last_step(zoo, tmp_path):
    """super-gradients keeps both."""
    net = zoo["yolox_n"].state_dict()
    average = {f"module.{name}": 0 * tensor for name, tensor in net.items()}
    torch.save({"net": net, "ema_net": average, "epoch": 3, "metrics": {"mAP": 0.4}}, tmp_path / "ckpt_best.pth")
    assert not any(p.any() for p in models.get("yolox_n", C, weights=tmp_path / "ckpt_best.pth").parameters())


@pytest.mark.parametrize("name", SMALL)
def test_another_class_count_replaces_the_prediction_layers_and_says_so(zoo, name, tmp_path, caplog):
    save_file(zoo[name].state_dict(), tmp_path / "model.safetensors")
    other = models.get(name, 3, weights=tmp_path)
    assert "is for other classes: the layers that predict the 3 classes here start afresh" in caplog.text
    assert len(caplog.records) == 1
    ours = other.state_dict()
    for key, tensor in zoo[name].state_dict().items():
        if not key.endswith("num_batches_tracked"):
            same = tensor.shape == ours[key].shape and torch.equal(tensor, ours[key])
            assert ("cls_preds" in key) != same, key
    with pytest.raises(RaydetError, match="is not for the 3 classes of the data: train it on them first"):
        models.load_weights(models.get(name, 3), tmp_path, strict=True)


NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture
def named(zoo, tmp_path):
    """Saves a model of the zoo as a checkpoint that says the names of its classes."""

    def save(name):
        folder = tmp_path / "checkpoint_000001"
        folder.mkdir()
        save_file(zoo[name].state_dict(), folder / "model.safetensors")
        classes = [{"id": number, "name": each} for number, each in enumerate(NAMES)]
        (folder / "config.json").write_text(json.dumps({"licence": "mine", "classes": classes}))
        return folder

    return save


@torch.no_grad()
def scores(model):
    """Class scores of a random image, [points, classes]."""
    images = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    decoded = model.eval()(images)[0]
    return (decoded[1] if isinstance(decoded, tuple) else decoded[..., 5:])[0]


@pytest.mark.parametrize("form", ["folder", "file", "address"])
@pytest.mark.parametrize("name", SMALL)
def test_classes_in_another_order_keep_their_rows(zoo, name, form, named, caplog):
    folder = named(name)
    path = {"folder": folder, "file": folder / "model.safetensors"}.get(form, (folder / "model.safetensors").as_uri())
    order = [3, 0, 4, 1, 2]
    model = models.get(name, C)
    models.load_weights(model, path, class_names=[NAMES[number] for number in order])
    before = scores(zoo[name])
    assert (before.std(0) > 0).all()
    torch.testing.assert_close(scores(model), before[:, order])
    assert "in another order: its prediction layers are put in that of the data" in caplog.text
    with pytest.raises(RaydetError, match="detects the same classes in another order than the data has"):
        models.load_weights(model, path, strict=True, class_names=[NAMES[number] for number in order])


@pytest.mark.parametrize("names", [("dog", "fly", "ant"), ("dog", "fly", "ant", "gnu", "bee"), ("fly", "gnu")])
@pytest.mark.parametrize("name", SMALL)
def test_classes_that_the_weights_do_not_know_begin_afresh_by_name(zoo, name, names, named, caplog):
    torch.manual_seed(1)
    fresh = models.get(name, len(names))
    torch.manual_seed(1)
    model = models.get(name, len(names))
    folder = named(name)
    models.load_weights(model, folder, class_names=names)
    first = 1 if name.startswith("ssd") else 0  # the background's, which all know
    ours, theirs, new = (m.state_dict() for m in (model, zoo[name], fresh))
    known = [each for each in names if each in NAMES]
    for key in (key for key in ours if ".cls_preds." in key):
        by_class = [tensors[key].unflatten(0, (first + count, -1)) for tensors, count in
                    ((ours, len(names)), (theirs, C), (new, len(names)))]  # fmt: skip
        for number, each in enumerate(names):
            expected = by_class[1][first + NAMES.index(each)] if each in NAMES else by_class[2][first + number]
            assert torch.equal(by_class[0][first + number], expected), (key, each)
        if first:
            assert torch.equal(by_class[0][0], by_class[1][0] if known else by_class[2][0])
    (record,) = caplog.records
    assert all(each in record.getMessage() for each in names if each not in NAMES)
    with pytest.raises(RaydetError, match=r"detects 5 classes that are not the \d of the data.* fly"):
        models.load_weights(model, folder, strict=True, class_names=names)


def test_a_head_whose_rows_are_not_known_begins_afresh(named, caplog):
    """Of one's own, with more than a row a class: which is whose, only its author knows."""

    def double(count):
        model = models.get("yolox_n", count)
        model.head.cls_preds = nn.ModuleList(nn.Conv2d(64, 2 * count, 1) for _ in range(3))
        return model

    folder = named("yolox_n")
    save_file(double(C).state_dict(), folder / "model.safetensors")
    model = double(C)
    before = model.head.cls_preds[0].weight.clone()
    models.load_weights(model, folder, class_names=NAMES[::-1])
    assert torch.equal(model.head.cls_preds[0].weight, before)
    assert "start afresh" in caplog.text


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("none.pth", "neither a weights file nor a checkpoint folder.*`raydet weights` lists"),
        ("file:///none/yolox.pth", "file:///none/yolox.pth cannot be read: "),
        ("nowhere://none/yolox.pth", "nowhere://none/yolox.pth cannot be read: "),
    ],
)
def test_what_is_not_there_is_refused(weights, message):
    with pytest.raises(RaydetError, match=message):
        models.get("yolox_n", weights=weights)


def test_weights_of_another_model_are_refused(zoo, tmp_path):
    save_file(zoo["yolox_n"].state_dict(), tmp_path / "model.safetensors")
    for name in ("yolox_t", "ppyoloe_s", "yolo_nas_s", "ssd_lite_mobilenet_v2"):
        kind = type(models.get(name)).__name__
        with pytest.raises(
            RaydetError, match=rf"is not of a {kind}: \d+ tensors do not fit, such as (backbone|neck|head)"
        ):
            models.get(name, C, weights=tmp_path)


def test_a_licence_goes_with_the_weights(shared, zoo, tmp_path, caplog):
    """YOLO-NAS' published weights are not for commercial use."""
    torch.save({"net": tensors_of(shared, "sg_yolo_nas_s")}, tmp_path / "nas.pth")
    assert "non-commercial" in models.load_weights(models.get("yolo_nas_s"), tmp_path / "nas.pth").licence
    assert "non-commercial" in caplog.text
    with pytest.raises(RaydetError, match=r"YOLO-NAS under super-gradients' names\) is not of a PPYoloE_S"):
        models.get("ppyoloe_s", weights=tmp_path / "nas.pth")
    (tmp_path / "config.json").write_text(json.dumps({"licence": "mine"}))
    save_file(zoo["yolox_n"].state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, (tmp_path / "model.safetensors").as_uri()):
        assert models.get("yolox_n", C, weights=path).licence == "mine"


def test_depthwise_pairs_of_super_gradients_are_translated(zoo):
    """No reference of that size is at hand: its names are those of the larger ones, its pairs `dconv` and `conv`."""
    adapter = models.family_of("yolox_n").adapters[1]
    names = {
        "_backbone._modules_list.1.dconv.conv.weight": "backbone.dark2.0.dconv.conv.weight",
        "_backbone._modules_list.1.conv.bn.bias": "backbone.dark2.0.pconv.bn.bias",
        "_backbone._modules_list.2.bottlenecks.0.cv2.conv.conv.weight": "backbone.dark2.1.m.0.conv2.pconv.conv.weight",
        "_backbone._modules_list.2.bottlenecks.0.cv1.conv.weight": "backbone.dark2.1.m.0.conv1.conv.weight",
        "_head._modules_list.14.cls_convs.0.1.conv.conv.weight": "head.cls_convs.0.1.pconv.conv.weight",
        "_head._modules_list.14.reg_convs.2.0.dconv.bn.running_mean": "head.reg_convs.2.0.dconv.bn.running_mean",
    }
    assert list(adapter.translate(dict.fromkeys(names))) == list(names.values())
    assert set(names.values()) <= set(zoo["yolox_n"].state_dict())


def test_yolox_files_as_super_gradients_published_them(shared, tmp_path):
    """A Focus stem, names that changed later, and buffers of strides: as its own loader translates them."""
    tensors = tensors_of(shared, "sg_yolox_s")
    torch.save({"net": tensors}, tmp_path / "later.pth")
    stem = tensors.pop("_backbone._modules_list.0.conv.weight")
    slices = [stem[:, :, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    published = {"stride": torch.zeros(3), "_head.anchors._stride": torch.zeros(3)}
    published["_head._modules_list.14.stride"] = torch.zeros(3)
    published["_backbone._modules_list.0.conv.conv.weight"] = torch.cat(slices, dim=1)
    for name, tensor in tensors.items():
        old = name.replace("_backbone._modules_list.0.bn", "_backbone._modules_list.0.conv.bn")
        old = old.replace(".bottlenecks.", ".m.")
        published[re.sub(r"(_modules_list\.\d+)\.conv(\d)\.", r"\1.cv\2.", old)] = tensor
    torch.save({"net": published}, tmp_path / "published.pth")
    ours, theirs = (models.get("yolox_s", weights=tmp_path / f"{name}.pth") for name in ("later", "published"))
    for (name, tensor), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def tensors_of(shared, reference):
    """Random tensors under the names of a reference."""
    description = json.loads((shared / f"golden/models/{reference}.json").read_text())
    shapes = description["tensors"]
    shapes |= {name: shapes[name.rpartition(".")[0] + ".weight"] for name in description["statistics"]}
    return {name: torch.rand(shape) for name, shape in shapes.items()}


def test_the_constant_in_early_files_of_ppyoloe_is_left_out(shared, tmp_path):
    tensors = {**tensors_of(shared, "sg_ppyoloe_s"), "head.proj_conv": torch.zeros(1, 17, 1, 1)}
    torch.save({"net": tensors}, tmp_path / "early.pth")
    models.get("ppyoloe_s", weights=tmp_path / "early.pth")


def test_a_model_s_own_names_go_before_those_of_other_projects(tmp_path):
    """A backbone with a part named backbone has names like Megvii's."""
    model = models.get("yolox_n", C)
    model.backbone.backbone = nn.Conv2d(3, 3, 1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    models.load_weights(model, tmp_path)


def test_files_of_before_the_zip_format_are_read(zoo, tmp_path):
    net = zoo["yolox_n"].state_dict()
    torch.save({"net": net}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    models.get("yolox_n", C, weights=tmp_path / "old.pth")


def test_files_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(RaydetError, match=r"text\.pth is not a checkpoint that can be loaded safely"):
        models.get("yolox_n", weights=tmp_path / "text.pth")
    torch.save({"model": {"layer.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(RaydetError, match=r"tensors like layer\.weight are of no model known here"):
        models.get("yolox_n", weights=tmp_path / "other.pth")
    torch.save({"model": [1, 2]}, tmp_path / "list.pth")
    with pytest.raises(RaydetError, match="holds no tensors by name"):
        models.get("yolox_n", weights=tmp_path / "list.pth")


def test_damaged_safetensors_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(RaydetError, match=r"model\.safetensors is damaged"):
        models.get("yolox_n", weights=tmp_path)


def test_what_trainers_keep_beside_the_weights_does_not_matter(zoo, tmp_path):
    """YOLOX's own keeps its best AP as a number of NumPy, super-gradients keeps settings of classes of its own."""
    beside = {"ap": np.float64(0.3), "lrs": np.arange(2), "settings": Namespace(lr=0.1), "when": UserList([1, 2])}
    net = zoo["yolox_n"].state_dict()
    torch.save({"net": net, **beside}, tmp_path / "ckpt.pth")
    again = models.get("yolox_n", C, weights=tmp_path / "ckpt.pth").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in net.items() if not key.endswith("batches_tracked"))


class Trap:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return self.call(), (str(self.folder),)


class TrapOfTheSystem(Trap):
    def call(self):
        return os.mkdir


class TrapOfALibrary(Trap):
    def call(self):
        return shutil.rmtree


@pytest.mark.parametrize("trap", [TrapOfTheSystem, TrapOfALibrary])
def test_nothing_in_a_weights_file_is_run(zoo, tmp_path, trap):
    (tmp_path / "folder").mkdir()
    target = tmp_path / ("folder" if trap is TrapOfALibrary else "new")
    torch.save({"net": zoo["yolox_n"].state_dict(), "trap": trap(target)}, tmp_path / "ckpt.pth")
    with contextlib.suppress(RaydetError):  # torch refuses the system's, and what is no more than ignored may load
        models.get("yolox_n", C, weights=tmp_path / "ckpt.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pth", "folder"]
