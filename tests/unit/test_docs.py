"""What README and docs say: commands parse and name keys that there are, links lead somewhere, examples run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import cv2
import pytest
import typer.main
import yaml

import raydet
from raydet.cli import app
from raydet.recipe import Recipe, load, shipped
from raydet.visualization import write_video
from tests.command import raydet as command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster/README.md"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
FILES = {"mine.yaml": "yolox_finetune", "runs/mine-tune/best_recipe.yaml": "demo"}  # that a reader has made
# Commands of others: not ours to check, and not run here.
OTHERS = {
    *("make", "pip", "python", "docker", "helm", "kubectl", "ssh", "export", "source", "apt", "wandb"),
    *("ray up", "ray down", "ray dashboard", "ray start", "ray get-auth-token", "ray job logs", "ray job stop"),
}


def commands():
    """Every indented command and every one in backticks that begins with raydet or ray job submit."""
    found = {}
    for page, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        indented = re.findall(r"^(?: {4}| {7})(\S.*)$", prose, re.MULTILINE)
        quoted = re.findall(r"`((?:raydet|ray job submit) [^`]*)`", prose)
        for line in [*(line for line in indented if re.match(r"[a-z]+ ", line) and "→" not in line), *quoted]:
            found[f"{page}: {line}"] = line
    return found


COMMANDS = commands()


def ours(line):
    """The words after `raydet` of a command of ours, also as a job; None for others'."""
    words = shlex.split(line.replace("…", "X"), comments=True)
    if words[:3] == ["ray", "job", "submit"]:
        options, script = words[3 : words.index("--")], words[words.index("--") + 1 :]
        assert script[0] == "python"
        assert (ROOT / script[1]).is_file()
        assert options == ["--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml"]
        name = Path(script[1]).stem
        return ["batch-predict" if name == "predict" else name, *script[2:]]
    if words[0] == "raydet":
        return words[1:]
    assert any(line.startswith(other) for other in OTHERS), "neither a command of raydet nor one that is known"
    return None


def test_there_are_commands():
    assert sum(ours(line) is not None for line in COMMANDS.values()) > 40


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_a_command_parses_and_its_settings_exist(line):
    words = ours(line)
    if words is None:
        return
    group = typer.main.get_command(app)
    if len(words) == 1 and words[0] == "--help":
        return
    found = group.get_command(click.Context(group), words[0])
    assert found is not None, f"there is no command {words[0]}"
    if len(words) == 1:
        return
    arguments = words[1 : words.index(">")] if ">" in words else words[1:]
    arguments = arguments[: arguments.index("&&")] if "&&" in arguments else arguments
    given = found.make_context(words[0], list(arguments), resilient_parsing=False).params
    overrides = [word for word in given.get("overrides") or [] if word != "KEY=VALUE"]
    if overrides:
        recipe = next((given[key] for key in ("recipe", "data", "name") if given.get(key)), None)
        recipe = FILES.get(recipe, recipe)
        own = [word for word in overrides if re.match(r"(model|loss|data)\.(name|format)=mypackage|loss\.factor", word)]
        load(recipe if recipe in shipped() else Recipe(), [word for word in overrides if word not in own])


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", TEXTS[page]):
        if target and not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", TEXTS)
def test_anchors_are_headlines(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", TEXTS[page]):
        other = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        heads = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def blocks(language):
    for page, text in TEXTS.items():
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)):
            yield pytest.param(block, id=f"{page}-{number}")


@pytest.mark.parametrize("block", list(blocks("python")))
def test_python_compiles_and_imports_what_there_is(block):
    compile(block, "block", "exec")
    imports = re.findall(r"^(?:from raydet\S* import .*|import raydet\S*)$", block, re.MULTILINE)
    exec("\n".join(imports), {})


def test_what_the_pages_print_of_raydet_is_there_after_import_raydet():
    """In a process of its own, which has imported none of it; nor has `import raydet` alone."""
    printed = set(re.findall(r"\braydet\.([a-z_]+(?:\.[A-Z]\w+|\.[a-z_]+\()?)", "".join(TEXTS.values())))
    printed = sorted(name.rstrip("(") for name in printed)
    assert {"load", "metrics.DetectionMetrics", "models.get", "data.loader", "tracking"} <= set(printed)
    reads = "\n".join(f"operator.attrgetter({name!r})(raydet)" for name in printed)
    script = f"import operator, sys, raydet\nassert not {{'torch', 'cv2', 'ray'}} & set(sys.modules)\n{reads}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'raydet' has no attribute 'nothing'"):
        _ = raydet.nothing


@pytest.mark.parametrize("block", list(blocks("yaml")))
def test_yaml_is_part_of_a_recipe(block, tmp_path):
    (tmp_path / "mine.yaml").write_text(block)
    load(tmp_path / "mine.yaml")


def guide_keys():
    text = TEXTS["docs/from_supergradients.md"]
    return sorted(set(re.findall(r"`((?:data|augment|loss|train|eval|scale|track|model)\.[a-z_0-9]+)\b(?!\()", text)))


@pytest.mark.parametrize("key", guide_keys())
def test_the_guide_s_keys_exist(key):
    section, _, name = key.partition(".")
    recipes = [load(recipe) for recipe in ("coco2017_yolox_s", "coco2017_ppyoloe_s")]
    assert any(name in getattr(recipe, section).model_dump() for recipe in recipes)


def translated():
    return next(block.values[0] for block in blocks("yaml") if block.id.startswith("docs/from_supergradients"))


def test_the_translated_recipe_is_ours_but_for_what_it_says(tmp_path):
    (tmp_path / "mine.yaml").write_text(translated())
    mine, shipped_one = (load(recipe).model_dump() for recipe in (tmp_path / "mine.yaml", "coco2017_yolox_s"))
    for section in ("model", "data", "augment", "train"):
        assert mine[section] == shipped_one[section], section
    assert yaml.safe_load(translated())["loss"]["name"] == mine["loss"]["name"] == "YoloXDetectionLoss"


def test_the_translated_recipe_trains_on_coco(shared, tmp_path):
    (tmp_path / "mine.yaml").write_text(translated())
    coco = shared / "data/coco_mini"
    overrides = [
        f"data.root={coco}",
        f"storage={tmp_path}",
        *("data.image_size=96", "train.batch_size=8", "scale.num_workers=1"),
    ]
    said = []
    result = raydet.train(tmp_path / "mine.yaml", overrides=overrides, debug=True, device="cpu", say=said.append)
    assert any("step 16/16" in line for line in said)
    assert "val/mAP@0.50:0.95" in result.metrics


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """mypackage with the modules that the pages print."""
    package = tmp_path / "mypackage"
    package.mkdir()
    for page, module in (("docs/own_model.md", "mymodel"), ("docs/own_loss.md", "mylosses")):
        (package / f"{module}.py").write_text(next(b.values[0] for b in blocks("python") if b.id.startswith(page)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        ("yolox_finetune", ["model.name=mypackage.mymodel:build"]),
        ("ppyoloe_finetune", ["loss.name=mypackage.mylosses:MyLoss", "loss.factor=0.5", "model.name=ppyoloe_s"]),
    ],
)
def test_the_examples_of_one_s_own_train(recipe, setting, shapes, tmp_path, own_modules):
    small = [f"data.root={shapes}", f"storage={tmp_path}/runs", "data.image_size=64", "train.batch_size=8"]
    small += ["data.max_num_samples=16", "train.epochs=1"]
    result = raydet.train(recipe, overrides=[*setting, *small], debug=True, device="cpu", say=print)
    assert result.checkpoint.is_dir()


# What runs below as it is printed, in a folder with a run, photos and a video; evaluate and tune-nms with --debug, so
# that no cluster is started. The rest trains (tests/ray does), needs COCO, or a cluster.
RUNS = ("inspect /data/mine", "recipes", "plot runs/mine", "report runs/mine", "predict runs/mine", "predict mine.onnx")
RUNS += ("export runs/mine", "evaluate runs/mine", "tune-nms runs/mine")
PRINTED = sorted({line for line in COMMANDS.values() if line.startswith(tuple(f"raydet {start}" for start in RUNS))})


@pytest.fixture(scope="module")
def workplace(shapes, tmp_path_factory):
    """A folder with what the pages' reader has: a run, its photos, a video, an exported model."""
    folder = tmp_path_factory.mktemp("work")
    small = [f"data.root={shapes}", f"storage={folder}/runs", "name=mine", "data.image_size=64", "train.batch_size=8"]
    raydet.train("yolox_n_finetune", overrides=[*small, "train.epochs=1"], debug=True, device="cpu", say=print)
    (folder / "runs/mine-debug").rename(folder / "runs/mine")
    (folder / "photos").mkdir()
    images = [cv2.resize(cv2.imread(str(path)), (96, 96)) for path in sorted((shapes / "val").glob("*.jpg"))[:3]]
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"photos/{number}.jpg"), image)
    write_video(folder / "clip.mp4", iter(images), 5.0)
    return folder


@pytest.mark.parametrize("line", PRINTED)
def test_a_command_runs_as_printed(line, workplace, shapes):
    words = [word.replace("/data/mine", str(shapes)) for word in ours(line)]
    words = words[: words.index(">")] if ">" in words else words
    if words[:2] == ["predict", "mine.onnx"] and not (workplace / "mine.onnx").exists():  # the line above it
        assert command("export", "runs/mine", "--out", "mine.onnx", cwd=workplace).returncode == 0
    if words[0] in ("evaluate", "tune-nms"):
        words += ["--debug", "--device", "cpu", *(["--trials", "4"] if words[0] == "tune-nms" else [])]
    done = command(*words, cwd=workplace)
    assert done.returncode == 0, done.stderr


def test_most_commands_on_a_run_are_run():
    assert len(PRINTED) >= 12
