"""A sweep, but for Ray: what it may try, how draws become settings, its table and its pictures."""

import json

import cv2
import numpy as np
import pytest
from rich.console import Console

from raydet.errors import RaydetError
from raydet.recipe import Recipe, Space, load, override
from raydet.tuning.pictures import COORDINATES, IMPORTANCE, _correlation_ratio, _ranks, draw
from raydet.tuning.sweep import _domain, _open, _scheduler, tune
from raydet.tuning.trials import (
    ERROR,
    SUMMARY,
    VALUES,
    Trial,
    drawn,
    folder_name,
    from_json,
    read_trials,
    table,
    to_json,
)

SPACE = {
    "loss.iou_weight": Space(loguniform=(1, 10)),
    "train.lr": Space(uniform=(0.01, 0.1)),
    "augment.hue": Space(integer=(0, 20)),
    "model.name": Space(choice=["yolox_n", "yolox_t"]),
    "augment.scale": Space(grid=[[0.5, 1.5], [0.9, 1.1]]),
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["tune.space={train.lr: {uniform: [0.1, 0.2]}}"], {"train.lr": Space(uniform=(0.1, 0.2))}),
        (["tune.space.train.lr={uniform: [0.1, 0.2]}"], {"train.lr": Space(uniform=(0.1, 0.2))}),
        (
            ["tune.space={loss: {iou_weight: {choice: [1, 5]}, cls_weight: {grid: [1]}}}"],
            {"loss.iou_weight": Space(choice=[1, 5]), "loss.cls_weight": Space(grid=[1])},
        ),
    ],
)
def test_a_space_is_given_by_whole_keys_or_by_sections(given, expected):
    recipe = load("coco2017_yolox_s", given)
    assert recipe.tune.space == expected
    assert load(recipe).tune.space == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tune.space={}", "tune.space is empty: say what to try, such as tune.space.loss.iou_weight="),
        ("tune.space.train.lr={chosen: [1, 2]}", "tune.space.train.lr.chosen: no such setting"),
        ("tune.space.train.lr={uniform: [2, 1]}", "the first of the two must not be larger"),
        ("tune.space.train.lr={uniform: [1, 2], choice: [1]}", "one of grid, choice, uniform, loguniform, integer"),
        ("tune.space.train.lr={choice: []}", "at least 1 item"),
        ("tune.space.train.lr={loguniform: [0, 1]}", "greater than 0"),
        ("tune.space.train.lr={uniform: [0, 1]}", "tune.space: recipe: train.lr: Input should be greater than 0"),
        ("tune.space.train.rl={uniform: [0.1, 1]}", "tune.space: recipe: train.rl: no such setting; did you mean"),
        ("tune.space.loss.alpha={choice: [1]}", "loss.alpha: no such setting; it is an argument of another loss"),
        ("tune.space.scale.num_workers={choice: [1, 2]}", "scale.num_workers is the same for all trials"),
        ("tune.space.name={choice: [a, b]}", "name is the same for all trials"),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_anything_starts(given, message, tmp_path):
    clear = [] if "space={}" in given else ["tune.space={}"]
    with pytest.raises(RaydetError, match=message.replace("(", r"\(")):
        tune("coco2017_yolox_s", overrides=[*clear, given, f"storage={tmp_path}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("search", "among", "message"),
    [
        ("grid", "{uniform: [0.1, 1]}", "uniform has no end"),
        ("optuna", "{grid: [0.1, 1]}", "Optuna tries no grid"),
    ],
)
def test_a_search_says_what_it_cannot_draw_from(search, among, message, tmp_path):
    with pytest.raises(RaydetError, match=message):
        tune(
            "coco2017_yolox_s",
            overrides=[f"tune.space.train.lr={among}", f"tune.search={search}", f"storage={tmp_path}"],
        )


def test_draws_become_the_settings_of_a_recipe():
    config = {
        "loss.iou_weight": 2.5,
        "train.lr": 1e-05,
        "augment.hue": 7,
        "model.name": 1,
        "augment.scale": 0,
    }
    values = drawn(SPACE, config)
    recipe = load(Recipe(name="x"), [override(key, value) for key, value in values.items()])
    assert recipe.loss.iou_weight == 2.5
    assert recipe.train.lr == 1e-05
    assert recipe.augment.hue == 7
    assert recipe.model.name == "yolox_t"
    assert recipe.augment.scale == (0.5, 1.5)


@pytest.mark.parametrize(
    ("kind", "draws"),
    [("integer", set(range(3, 7))), ("choice", {0, 1}), ("uniform", None), ("loguniform", None)],
)
def test_ray_draws_all_that_is_in_a_space_and_nothing_else(kind, draws):
    values = {"integer": (3, 6), "choice": ["a", "b"], "uniform": (0.1, 0.3), "loguniform": (0.1, 10)}[kind]
    domain = _domain(Space(**{kind: values}), "random")
    found = [domain.sample() for _ in range(200)]
    if draws is not None:
        assert set(found) == draws
        return
    assert values[0] <= min(found) < max(found) <= values[1]
    middle = np.mean(values) if kind == "uniform" else 1.0
    assert 60 < sum(value < middle for value in found) < 140


@pytest.mark.parametrize("search", ["random", "grid"])
def test_grids_are_tried_whole(search):
    assert _domain(Space(grid=["a", "b", "c"]), search) == {"grid_search": [0, 1, 2]}
    assert isinstance(_domain(Space(choice=["a", "b"]), search), dict) == (search == "grid")


@pytest.mark.parametrize(
    ("stop", "epochs", "kind", "brackets"),
    [
        ("asha", 27, "AsyncHyperBandScheduler", 1),
        ("hyperband", 27, "AsyncHyperBandScheduler", 4),
        ("hyperband", 2, "AsyncHyperBandScheduler", 1),
        ("median", 27, "MedianStoppingRule", None),
        ("none", 27, "FIFOScheduler", None),
        ("asha", 1, "FIFOScheduler", None),
    ],
)
def test_schedulers(stop, epochs, kind, brackets):
    sweep = Recipe(tune={"stop": stop}).tune
    scheduler = _scheduler(sweep, epochs)
    assert type(scheduler).__name__ == kind
    if brackets is not None:
        assert len(scheduler._brackets) == brackets


def test_a_folder_is_of_one_sweep(tmp_path):
    settings = load("demo", [f"storage={tmp_path}", "tune.trials=3"])
    _open(tmp_path / "demo-tune", settings)
    _open(tmp_path / "demo-tune", load(settings, ["tune.concurrent=1", "scale.num_workers=1"]))
    for change in ("tune.trials=4", "train.epochs=3", "tune.space={loss.cls_weight: {choice: [1]}}"):
        with pytest.raises(RaydetError, match=f"is a sweep with other settings .{change.partition('=')[0]}"):
            _open(tmp_path / "demo-tune", load(settings, [change]))


def make_trials(folder):
    for number, (values, finished) in enumerate([((0.1, 0.3), True), ((0.2,), False), ((), False)]):
        run = folder / folder_name(f"1f3a_{number:05}")
        run.mkdir(parents=True)
        (run / VALUES).write_text(json.dumps({"train.lr": 0.1 * (number + 1)}))
        lines = [json.dumps({"step": n, "epoch": n, "val/mAP@0.50": value}) for n, value in enumerate(values, start=1)]
        (run / "metrics.jsonl").write_text("\n".join(lines))
        if not values:
            (run / ERROR).write_text("x")
        if finished:
            (run / SUMMARY).write_text("{}")


def test_trials_are_read_from_their_folders_the_best_first(tmp_path):
    make_trials(tmp_path)
    trials = read_trials(tmp_path, "mAP@0.50")
    assert from_json(to_json(trials)) == trials
    assert [(trial.name, trial.state, trial.epoch, trial.value, trial.error) for trial in trials] == [
        ("trial_00000", "finished", 2, 0.3, ""),
        ("trial_00001", "stopped early", 1, 0.2, ""),
        ("trial_00002", "failed", 0, None, "x"),
    ]
    console = Console(width=120, record=True)
    console.print(table(trials, "mAP@0.50", 2, rows=2))
    shown = console.export_text()
    assert "0.3000" in shown
    assert "trial_00002" not in shown
    assert "and 1 more" in shown


def test_pictures_of_all_kinds_of_settings(tmp_path):
    generator = np.random.default_rng(0)
    trials = [
        Trial(
            f"trial_{number}",
            {
                "loss.iou_weight": float(generator.uniform(1, 10)),
                "train.lr": float(generator.uniform(0.01, 0.1)),
                "augment.hue": int(generator.integers(0, 21)),
                "model.name": ["yolox_n", "yolox_t"][number % 2],
                "augment.scale": [[0.5, 1.5], [0.9, 1.1]][number % 2],
            },
            "finished" if number % 3 else "stopped early",
            2,
            0.5 - number / 100,
        )
        for number in range(12)
    ]
    assert draw(trials, SPACE, "mAP@0.50:0.95", tmp_path) == [tmp_path / COORDINATES, tmp_path / IMPORTANCE]
    for name in (COORDINATES, IMPORTANCE):
        assert cv2.imread(str(tmp_path / name)).std() > 10
    for few in (trials[:1], trials[:2]):
        draw(few, SPACE, "mAP@0.50:0.95", tmp_path)


def test_correlations_by_hand():
    assert _ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    assert _correlation_ratio(["a", "a", "b", "b"], np.array([1.0, 1.0, 2.0, 2.0])) == 1
    assert _correlation_ratio(["a", "b", "a", "b"], np.array([1.0, 1.0, 2.0, 2.0])) == 0
