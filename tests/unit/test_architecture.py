"""Rules of the house. Most are read from the syntax trees of all modules, which takes about a second."""

import ast
import inspect
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import raydet
from raydet import losses, recipe
from raydet.recipe import Recipe

# From the ground up: a module imports what is in its own line or in one above it.
LAYERS = """
    errors
    boxes outputs plugins store devices yaml_text
    losses models postprocess lettering visualization metrics evaluation
    recipe cluster
    data
    runs
    predict
    reports
    tracking
    training
    api
    tuning
    supergradients
    cli
    raydet
"""
LAYER = {name: number for number, line in enumerate(LAYERS.split("\n")) for name in line.split()}

# Who may import Ray: all others can be read, tested and debugged without it.
RAY = ("data.limits", "data.stream", "data.shards", "cluster", "training.worlds", "training.on_ray", "training.beside")
RAY += ("training.controller", "predict.on_ray", "tracking.ray_metrics", "tuning")
RAY_AT_THE_TOP = ("tuning",)

# What can be lifted out of raydet: it computes, and reads and writes nothing.
LIFTED = ("losses", "models", "boxes", "outputs", "postprocess")
WITH_FILES = ("models.reference_weights", "models.download", "models.export")
FILES = ("io", "os", "pathlib", "shutil", "tempfile", "json", "pickle", "yaml", "raydet.store", "raydet.yaml_text")

ROOT = Path(raydet.__file__).parent
TREES = {
    ".".join(("raydet", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in sorted(ROOT.rglob("*.py"))
}


def within(module, names):
    """Is a module one of these, or in a package that is one of these?"""
    return any(f"{module}.".startswith(f"raydet.{name}.") for name in names)


def nodes(tree, lazily=False):
    """Every node, and whether it is run only when a function is; what is there for annotations only is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node, lazily
        yield from nodes(node, lazily or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def imports(module):
    """What a module imports: names of modules, and whether it does so lazily, in a function."""
    for node, lazily in nodes(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazily) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports name the whole path"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner != "raydet.__version__":  # a constant, which raydet/__init__.py has in front of its imports
                    yield inner if inner in TREES else node.module, lazily


IMPORTS = {module: list(imports(module)) for module in TREES}
OURS = {module: {name for name, _ in found if name in TREES} for module, found in IMPORTS.items()}


def layer(module):
    top = module.split(".")[1] if "." in module else module
    assert top in LAYER, f"{top} stands in no layer"
    return LAYER[top]


@pytest.mark.parametrize("module", TREES)
def test_a_module_imports_its_own_layer_or_lower_ones(module):
    upwards = [name for name in OURS[module] if layer(name) > layer(module)]
    assert not upwards, f"{module} imports upwards: {upwards}"


def test_no_files_import_each_other_in_a_circle():
    try:
        TopologicalSorter(OURS).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("module", TREES)
def test_ray_is_imported_where_it_belongs(module):
    for name, lazily in IMPORTS[module]:
        if name.split(".")[0] == "ray":
            assert within(module, RAY), f"{module} imports {name}"
            assert lazily or within(module, RAY_AT_THE_TOP), f"{module} imports {name} at its top: it takes seconds"


@pytest.mark.parametrize("module", [module for module in TREES if within(module, LIFTED)])
def test_what_can_be_lifted_out_knows_no_files(module):
    """Nor recipes or Ray, which the tests above see to."""
    if within(module, WITH_FILES):
        return
    used = {name for name, _ in IMPORTS[module] if name in FILES or name.split(".")[0] in FILES}
    used |= {node.id for node, _ in nodes(TREES[module]) if isinstance(node, ast.Name) and node.id == "open"}
    assert not used, f"{module} uses {used}"


def bound(module):
    """Names that a module has at its top, also those that are imported on first use and named for annotations."""
    names, body = set(), list(TREES[module].body)
    for node in body:
        if isinstance(node, ast.If):
            body += node.body + node.orelse
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {
                inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
            }
    return names


@pytest.mark.parametrize("module", [module for module in TREES if "__all__" in bound(module)])
def test_public_names_are_there(module):
    (public,) = (
        ast.literal_eval(node.value)
        for node in TREES[module].body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    assert len(set(public)) == len(public)
    assert set(public) <= bound(module), f"{module}.__all__ names what {module} has not"


def test_each_loss_section_has_the_arguments_and_defaults_of_its_class():
    """But for what raydet fills in itself."""
    filled_in = {"strides", "num_classes", "reg_max", "default_boxes", "image_size"}
    for name, section in recipe.LOSSES.items():
        arguments = inspect.signature(getattr(losses, name)).parameters
        assert set(section.model_fields) - {"name"} == set(arguments) - filled_in
        for key in section.model_fields.keys() - {"name"}:
            assert section.model_fields[key].default == arguments[key].default, f"{name}.{key}"


RIDDLE = re.compile(r"(of|the same|likewise)\b", re.IGNORECASE)


def described(module):
    """Arguments and attributes in docstrings, and options of the command line: name → description."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.get_docstring(node) or ""
            for part in re.findall(r"^(?:Args|Attributes):\n((?: {4}.*\n?|\n)*)", text, re.MULTILINE):
                for name, description in re.findall(r"^ {4}(\S[^:]*): (.*)$", part, re.MULTILINE):
                    yield f"{node.name}: {name}", description
        elif isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
            yield "an option", node.value.value


@pytest.mark.parametrize("module", TREES)
def test_descriptions_of_arguments_name_their_noun(module):
    """`width: of the image` is a riddle until one has read `width` again: `width of the image in pixels`."""
    riddles = [f"{name}: {description}" for name, description in described(module) if RIDDLE.match(description)]
    assert not riddles, "\n".join(riddles)


def settings(section, prefix=""):
    for key, field in section.model_fields.items():
        value = field.get_default()
        if isinstance(value, recipe.Section):
            yield from settings(type(value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", field.description


SETTINGS = [
    *settings(Recipe),
    *(setting for kind in (*recipe.LOSSES.values(), recipe.OwnLoss) for setting in settings(kind, "loss.")),
    *settings(recipe.ExtremeBatchDetectionVisualizationCallback, "track.extreme_batches."),
    *settings(recipe.DetectionVisualizationCallback, "track.visualize."),
]


@pytest.mark.parametrize(("key", "description"), SETTINGS, ids=[key for key, _ in SETTINGS])
def test_descriptions_of_settings_name_their_noun(key, description):
    assert description, f"{key} has no description"
    assert not RIDDLE.match(description), f"{key}: {description}"


# How many modules of raydet it takes to read a part of it. These numbers may only fall, but for a new data format.
BUDGETS = {"raydet.training.loop": 70, "raydet.api": 99, "raydet.predict.predictor": 54}


def imported_with(module):
    """All of our modules that the import of one imports."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in TREES and name not in seen:
            seen.add(name)
            waiting += [other for other, lazily in IMPORTS[name] if not lazily]
            waiting += [name.rpartition(".")[0]]
    return seen


@pytest.mark.parametrize("module", BUDGETS)
def test_what_a_part_imports_stays_within_its_budget(module):
    seen = imported_with(module)
    assert len(seen) <= BUDGETS[module], sorted(seen)


@pytest.mark.parametrize("module", ["raydet.training.controller", "raydet.data.stream"])
def test_controller_and_data_tasks_import_no_torch(module):
    """It would cost each of their processes seconds and 300 MB."""
    needing = {
        name
        for name in imported_with(module)
        for other, lazily in IMPORTS[name]
        if other.split(".")[0] == "torch" and not lazily
    }
    assert not needing
