import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raydet import recipe
from raydet.errors import RaydetError
from raydet.models import FAMILIES
from raydet.recipe import Recipe, Section, load, shipped
from raydet.runs.folder import run_folder


def keys(section: type[Section] | Section, prefix: str = "") -> set[str]:
    found = set()
    for name in type(section).model_fields:
        value = getattr(section, name)
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, Section) else {prefix + name}
    return found


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_holds_only_what_differs_from_its_base_or_the_defaults(name):
    text = shipped()[name].read_text()
    assert text.startswith("# "), "the first line says what it is"
    whole, content = load(name), yaml.safe_load(text)
    assert whole.name == name
    assert "name" not in content, "its file names it"
    if base := content.pop("base", None):
        defaults = load(base).model_dump()
    else:
        defaults = Recipe.model_validate({"loss": {"name": whole.loss.name}}).model_dump()
        defaults["loss"]["name"] = Recipe().loss.name
    mine = whole.model_dump()
    stated = [(key, inner) for key, value in content.items() for inner in (value if isinstance(value, dict) else [""])]
    assert stated
    for key, inner in stated:
        value, default = (tree[key][inner] if inner else tree[key] for tree in (mine, defaults))
        assert value != default, f"{key}.{inner} says the default"


def test_every_model_has_a_recipe_and_every_family_one_for_small_data():
    expected = {f"coco2017_{model}" for family in FAMILIES for model in family.models}
    expected |= {family.recipe for family in FAMILIES}
    assert set(shipped()) == expected | {"demo", "yolox_n_finetune", "bccd_yolox_n", "coco2017_dfine_s_deim"}
    for family in FAMILIES:
        names = {loss.__name__ for loss in family.losses}
        for name in [family.recipe, *(f"coco2017_{model}" for model in family.models)]:
            mine = load(name)
            assert mine.loss.name in names
            assert mine.model.name in family.models
            assert name in (family.recipe, f"coco2017_{mine.model.name}")


@pytest.mark.parametrize("order", [1, -1])
def test_another_loss_keeps_the_arguments_that_it_shares(order):
    overrides = ["loss.name=YoloXDetectionLoss", "loss.iou_weight=7"][::order]
    loss = load("coco2017_yolox_s", overrides).loss
    assert loss == recipe.YoloXDetectionLoss(iou_weight=7, l1_last_epochs=15)


def test_an_own_loss_gets_the_arguments_that_it_takes(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text("class Mine:\n    def __init__(self, iou_weight, alpha=1): pass\n")
    monkeypatch.chdir(tmp_path)
    mine = load("coco2017_yolox_s", ["loss.name=own_losses:Mine", "loss.alpha=0.5"])
    assert mine.loss.model_dump() == {"name": "own_losses:Mine", "iou_weight": 5.0, "alpha": 0.5}
    (tmp_path / "mine.yaml").write_text(recipe.describe(mine))
    assert load(tmp_path / "mine.yaml").loss == mine.loss


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=3", "epochs", 3),
        ("train.lr=1e-3", "lr", 0.001),
        ("train.lr=0.5", "lr", 0.5),
        ("train.precision=bf16", "precision", "bf16"),
    ],
)
def test_overrides(override, key, value):
    assert getattr(load("demo", [override]).train, key) == value


WRITTEN = {"1e-3": 0.001, "1E5": 1e5, "1.e3": 1000.0, "+1e3": 1000.0, ".5e-2": 0.005, "-2e+1": -20.0, "1.5": 1.5}


@pytest.mark.parametrize(("text", "value"), WRITTEN.items())
def test_numbers_are_read_as_everyone_writes_them(text, value, tmp_path):
    """YAML 1.1 takes most of these for text. What is quoted is text."""
    own = [
        f"augment.transforms=[{{name: 'mine:Grey', prob: {text}, mode: '{text}'}}]",
        f"tune.space.loss.alpha={{choice: [{text}]}}",
    ]
    (tmp_path / "mine.yaml").write_text(
        f"loss: {{name: 'mine:Loss', alpha: {text}}}\n"
        f"augment: {{transforms: [{{name: 'mine:Grey', prob: {text}, mode: '{text}'}}]}}\n"
        f"tune: {{space: {{loss.alpha: {{choice: [{text}]}}}}}}\n"
    )
    for mine in (load("demo", own), load(tmp_path / "mine.yaml")):
        assert mine.augment.transforms[0].model_extra == {"prob": value, "mode": text}
        assert mine.tune.space["loss.alpha"].values == [value]
    assert load(tmp_path / "mine.yaml").loss.model_extra == {"alpha": value}
    assert load(tmp_path / "mine.yaml", [f"loss.alpha={text}"]).loss.model_extra == {"alpha": value}


@pytest.mark.parametrize("text", ["2017", "001", "no", "2024-01-01", "1e3", "1e-3", "+1e3", ".5e-2"])
def test_what_is_text_stays_text(text, tmp_path):
    assert load("demo", [f"data.train_images={text}"]).data.train_images == text
    assert load("demo", [f"name={text}"]).name == text
    assert load("demo", ["model.weights=null"]).model.weights is None
    (tmp_path / "mine.yaml").write_text(
        f"name: {text}\nmodel: {{weights: null}}\ndata: {{train_images: {text}, class_inclusion_list: [{text}, cat]}}\n"
    )
    mine = load(tmp_path / "mine.yaml")
    assert (mine.name, mine.data.train_images, mine.model.weights) == (text, text, None)
    assert mine.data.class_inclusion_list == [text, "cat"]
    assert load(mine, [f"data.class_inclusion_list=[{text}]"]).data.class_inclusion_list == [text]
    (tmp_path / "again.yaml").write_text(recipe.describe(mine))
    assert load(tmp_path / "again.yaml") == mine
    assert load(mine, [recipe.override("name", text)]).name == text
    assert load(mine, [f"data={{train_images: {text}}}"]).data.train_images == text


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("/data/batch #2", "/data/batch #2"),
        ("#2", "#2"),
        ("a: b", "a: b"),
        ("[x", "[x"),
        ("*.jpg", "*.jpg"),
        ("{a}", "{a}"),
        ("!x", "!x"),
        ("- a", "- a"),
        ("'tis", "'tis"),
        ("it's", "it's"),
        (" x ", "x"),
        ("'a # b'", "a # b"),
        ('"2017"', "2017"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'null'", "null"),
    ],
)
def test_text_is_taken_as_it_is_typed(typed, value):
    assert load("demo", [f"data.train_images={typed}"]).data.train_images == value


@given(st.text())
@settings(max_examples=40, deadline=None)
def test_any_text_can_be_given_by_a_program(text):
    assert load("demo", [recipe.override("data.root", text)]).data.root == text


@pytest.mark.parametrize("value", ["320", "[320, 320]"])
def test_image_size_is_one_number_or_two(value):
    assert load("demo", [f"data.image_size={value}"]).data.image_size == (320, 320)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "train.epoch: no such setting; did you mean train.epochs?"),
        ("epochs=3", "epochs: no such setting; did you mean train.epochs?"),
        ("trian.epochs=3", "trian: no such setting; did you mean train?"),
        ("seed.x=3", "seed is a value, not a section"),
        ("train.epochs.x=3", "train.epochs.x: no such setting; epochs is a value, not a section"),
        ("train.epochs=many", "train.epochs: Input should be a valid integer"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1, not 0"),
        ("train.lr=.nan", "train.lr: Input should be a finite number"),
        ("data.image_size=100", "data.image_size: Value error, each side must be a positive multiple of 32, not 100"),
        (
            "loss.name=Nothing",
            "loss.name should be YoloXFastDetectionLoss, YoloXDetectionLoss, PPYoloELoss, SSDLoss, DFineLoss or",
        ),
        ("loss.iou_wait=1", "loss.iou_wait: no such setting; did you mean loss.iou_weight?"),
        ("loss.name=nowhere:Loss", "loss.name: cannot import nowhere (ModuleNotFoundError: No module named 'nowhere')"),
        ("loss.name=json:Loss", "json/__init__.py has no Loss"),
        ("loss.name=json:", "loss.name: 'json:' is not of the form package.module:name"),
        ("loss=PPYoloELoss", "loss.name should be YoloXFastDetectionLoss, YoloXDetectionLoss, PPYoloELoss, SSDLoss"),
        ("loss=null", "loss.name should be "),
        ("train.warmup_steps=5", "warmup_epochs and warmup_steps are both set: set the other to 0"),
        ("name=../../x", "name: Value error, the folder of the run would lie outside storage, not '../../x'"),
        ("name=/tmp/x", "name: Value error, the folder of the run would lie outside storage, not '/tmp/x'"),
        ("name=a/../../x", "name: Value error, the folder of the run would lie outside storage"),
        ("name=..", "name: Value error, the folder of the run would lie outside storage"),
        ("name=.", "name: Value error, the folder of the run would be storage itself"),
        ("train.epochs", "write section.key=value"),
        ("train.epochs=[", "not YAML"),
    ],
)
def test_wrong_overrides_are_refused_by_name(override, message):
    with pytest.raises(RaydetError) as error:
        load("demo", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.warmup_steps=5"],
            "train: Value error, warmup_epochs and warmup_steps are both set: set the other to 0",
        ),
        (
            ["scale.gpu_share=0.5", "scale.num_workers=2"],
            "scale: Value error, gpu_share below 1 needs num_workers: 1, as workers that exchange gradients need own "
            "GPUs",
        ),
        (
            ["track.visualize=[{phase: dusk}]"],
            "track.visualize.0.phase: Input should be 'train' or 'valid', not 'dusk'",
        ),
        (["train=fast"], "train: Input should be a valid dictionary or instance of Train, not 'fast'"),
    ],
)
def test_settings_that_exclude_each_other_are_named_without_their_whole_section(overrides, expected):
    with pytest.raises(RaydetError) as error:
        load("demo", overrides)
    assert str(error.value) == f"recipe demo: {expected}"


def test_overrides_are_a_list():
    with pytest.raises(RaydetError, match=r"overrides: 'train.epochs=1' is one text, not a list: \['train.epochs=1'\]"):
        load("demo", "train.epochs=1")


@pytest.mark.parametrize(("name", "folder"), [("mine", "mine"), ("group/mine", "group/mine"), ("..mine", "..mine")])
def test_a_run_lies_below_its_storage(name, folder, tmp_path):
    assert run_folder(load("demo", [f"storage={tmp_path}", f"name={name}"])) == tmp_path / folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: [", "is not YAML"),
        ("data: &it {root: *it}", "data.root: Input should be a valid string"),
        ("- 1", "holds no settings"),
        ("", "holds no settings"),
        ("x: 1", "x: no such setting"),
        ("train: images/train", "mine.yaml describes a data set and is no recipe: name its folder, /"),
        ("path: .\nnames: [a]", "mine.yaml describes a data set and is no recipe: name its folder, /"),
        ("loss: {name: [SSDLoss]}", "loss.name should be YoloXFastDetectionLoss, .*, not .'SSDLoss'."),
        ("loss: {name: SSDLoss, iou_weight: 1}", "loss.iou_weight: no such setting; it is an argument of another loss"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(RaydetError, match=message):
        load(path)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(RaydetError, match="did you mean coco2017_yolox_s"):
        load("coco_yolox_s")


def test_description_is_a_recipe_that_loads(tmp_path):
    mine = load("demo", ["train.epochs=7", f"model.weights='{' '.join(['a b'] * 60)}.pth'", "data.image_size=[64, 96]"])
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.describe(mine))
    assert load(path) == mine
    assert mine.model.weights == " ".join(["a b"] * 60) + ".pth"
    for key in keys(mine):
        assert f"{key.split('.')[-1]}: " in path.read_text()


def test_an_own_file_gets_defaults_and_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {epochs: 2}")
    mine = load(tmp_path / "mine.yaml")
    assert (mine.name, mine.train.epochs, mine.train.lr) == ("mine", 2, Recipe().train.lr)


def test_a_recipe_changes_settings_of_its_base(tmp_path):
    (tmp_path / "large.yaml").write_text("base: yolox_finetune\ntrain: {lr: 0.1}\ndata: {root: /large}\nname: large")
    (tmp_path / "mine.yaml").write_text("base: large.yaml\ntrain: {epochs: 2}\nloss: {iou_weight: 2}")
    mine, large, base = load(tmp_path / "mine.yaml"), load(tmp_path / "large.yaml"), load("yolox_finetune")
    assert (mine.name, large.name) == ("mine", "large")
    assert (mine.train.epochs, mine.train.lr, mine.train.batch_size) == (2, 0.1, base.train.batch_size)
    assert (mine.data.root, mine.loss.iou_weight, mine.augment) == ("/large", 2, base.augment)
    assert (large.train.epochs, large.loss) == (base.train.epochs, base.loss)


def test_another_loss_than_that_of_the_base_keeps_the_arguments_that_both_have(tmp_path):
    (tmp_path / "base.yaml").write_text("loss: {iou_weight: 7, cls_weight: 3}")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nloss: {name: YoloXDetectionLoss, cls_weight: 2}")
    assert load(tmp_path / "mine.yaml").loss == recipe.YoloXDetectionLoss(iou_weight=7, cls_weight=2)
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nloss: {name: SSDLoss}")
    assert load(tmp_path / "mine.yaml").loss == recipe.SSDLoss()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", "mine.yaml: base: .*nowhere.yaml is neither a recipe of raydet nor a YAML file"),
        ("yolox_finetunes", "did you mean yolox_finetune"),
        ("mine.yaml", "mine.yaml: base: .*it is its own base: .*mine.yaml → .*mine.yaml"),
        ("[demo]", "mine.yaml: base: give the name of a recipe or a YAML file, not .'demo'."),
    ],
)
def test_a_wrong_base_is_refused(base, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {base}\ntrain: {{epochs: 2}}")
    with pytest.raises(RaydetError, match=message):
        load(path)


def test_differences_leave_out_what_does_not_change_the_result():
    ours = load("demo", ["train.epochs=7", "scale.num_workers=8", "data.root=/x", "track.log_every=1", "storage=/y"])
    demo = load("demo")
    assert recipe.differences(ours, demo) == [f"train.epochs: {demo.train.epochs} there, 7 here"]


def test_lists_of_settings_survive_being_written_and_read(tmp_path):
    own = "augment.transforms=[{name: 'mypackage.mine:Grey', prob: 0.2}]"
    mine = load("demo", [own, "augment.multiscale=[64, 128]", "data.class_inclusion_list=[disc, ring]"])
    assert mine.augment.transforms[0].model_extra == {"prob": 0.2}
    (tmp_path / "mine.yaml").write_text(recipe.describe(mine))
    again = load(tmp_path / "mine.yaml")
    assert recipe.differences(mine, again) == []
    assert again.augment == mine.augment
