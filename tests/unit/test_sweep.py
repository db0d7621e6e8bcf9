"""A sweep, but for Ray: what it may try, how draws become settings, its table and its pictures."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from ray.tune.integration import ray_train
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.utils.callback import _create_default_callbacks
from rich.console import Console

from raydet.cluster import prepare_tune
from raydet.errors import RaydetError
from raydet.models import Preprocessing, get
from raydet.recipe import Eval, Recipe, Space, load, override
from raydet.runs.checkpoint import Config, Progress, pack, write
from raydet.tuning import sweep
from raydet.tuning.pictures import COORDINATES, IMPORTANCE, _correlation_ratio, _ranks, draw
from raydet.tuning.sweep import _domain, _open, _scheduler, tune
from raydet.tuning.trials import (
    ERROR,
    SUMMARY,
    VALUES,
    Board,
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


class RayTrial(SimpleNamespace):
    """What Ray Tune knows of a trial, made by hand."""

    def __init__(self, number, status, last_result=None):
        super().__init__(
            trial_id=f"1f3a_{number:05}",
            status=status,
            last_result=last_result or {},
            metric_analysis={},
            config={"train.lr": 0},
        )


@pytest.fixture
def board(tmp_path):
    make_trials(tmp_path)
    said = []
    with Board({"train.lr": Space(choice=[0.1])}, "mAP@0.50", 2, False, said.append, tmp_path) as shown:
        yield shown, said


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (0, "trial_00000: finished after epoch 2"),
        (1, "trial_00001: stopped early after epoch 1"),
        (2, "trial_00002 failed: x"),
    ],
)
def test_the_end_of_a_trial_is_what_its_folder_says(board, number, line, capsys):
    """After a kill -9, Ray Tune has not heard of the results of a trial that had finished."""
    shown, said = board
    trial = RayTrial(number, "RUNNING")
    shown.on_trial_complete(0, [trial], trial)
    assert said == [line]
    assert capsys.readouterr().out == "", "and nothing of Ray's"


def test_the_best_so_far_counts_the_value_that_has_just_come(board):
    shown, said = board
    trials = [RayTrial(0, "TERMINATED"), RayTrial(7, "RUNNING")]
    for value, best in ((0.1, "0.3000 of trial_00000"), (0.4, "0.4000 of trial_00007")):
        shown.on_trial_result(0, trials, trials[1], {"epoch": 1, "val/mAP@0.50": value})
        assert said[-1] == f"trial_00007: epoch 1/2  mAP@0.50 {value:.4f}  (best so far {best}; 1 running, 1 done)"


def test_ray_tune_adds_no_lines_of_its_own(board):
    shown, _ = board
    prepare_tune()
    added = _create_default_callbacks([shown])
    assert [callback for callback in added if isinstance(callback, TrialProgressCallback)] == [shown]


@pytest.mark.parametrize("trains_on", [False, True])
def test_a_trial_that_was_at_its_end_reports_it(demo, tmp_path, monkeypatch, trains_on):
    """Killed between its end and the note of it. The workers of one that trains on report themselves."""
    base = load("demo", [*demo, f"storage={tmp_path}", "tune.space={loss.iou_weight: {choice: [2]}}"])
    folder = tmp_path / "trial_00000"
    folder.mkdir()
    model = get("yolox_n", 5)
    lines = [{"step": 5 * epoch, "epoch": epoch, "val/mAP@0.50:0.95": 0.4 - epoch / 10} for epoch in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def keep(epoch):
        config = Config("yolox_n", tuple("abcde"), (1, 2, 3, 4, 5), (96, 96), Preprocessing(), Eval())
        files = pack(config, model, {"model": model.state_dict()}, Progress(40 * epoch), epoch, {})
        write(folder / f"checkpoint_{epoch:06d}", files)

    keep(1)
    if not trains_on:
        keep(2)
    reported = []
    context = SimpleNamespace(get_trial_id=lambda: "1f3a_00000")
    monkeypatch.setattr(sweep, "ray_tune", SimpleNamespace(get_context=lambda: context, report=reported.append))
    monkeypatch.setattr(ray_train, "TuneReportCallback", lambda: None)
    monkeypatch.setattr(sweep, "train", lambda *args, **given: keep(2) if trains_on else None)
    sweep.run_trial({"loss.iou_weight": 0}, base, {}, {})
    assert reported == ([] if trains_on else [{"val/mAP@0.50:0.95": pytest.approx(0.3), "epoch": 2}])


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
