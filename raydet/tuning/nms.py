"""`raydet tune-nms`: the thresholds of a checkpoint, tuned on CPUs by Ray Tune without running the model again."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from raydet.api import open_evaluation, run_evaluation
from raydet.cluster import connect, prepare_tune
from raydet.data import cache
from raydet.data.index import Index
from raydet.errors import RaydetError
from raydet.evaluation.coco import MAIN_METRIC
from raydet.models.download import is_published
from raydet.predict.predictor import post_prediction
from raydet.recipe import Eval, Recipe
from raydet.runs import checkpoint
from raydet.runs.mirror import opened
from raydet.runs.published import own_recipe
from raydet.store import Store
from raydet.training.job import Job
from raydet.training.validation import PROGRESS_EVERY_S
from raydet.tuning.candidates import FLOOR, TOP_K, CandidateSet, candidates_loop, keep
from raydet.tuning.thresholds import OF_NMS, SPACE, Comparison, Search, Setting, groups

PICTURE, TABLE = "tune_nms.png", "tune_nms.json"


@dataclass(frozen=True)
class Tuned:
    """What a search for thresholds found.

    Attributes:
        thresholds: thresholds to use: the winner's, or the old ones where the winner is no better on held-out images.
        winner: the best setting on the images that were searched on.
        comparison: the winner beside the default on the held-out images.
        values: value of each setting on the images that were searched on, best first.
        seconds: time of the search, without that of the candidates.
        folder: folder of the table and the picture.
        not_stored: why the checkpoint does not get them; empty: it has them, or no better ones were found.
        has_nms: whether settings of NMS are among those that were searched.
    """

    thresholds: Eval
    winner: Setting
    comparison: Comparison
    values: list[tuple[float, Setting]]
    seconds: float
    folder: Path
    not_stored: str = ""
    has_nms: bool = True

    @property
    def overrides(self) -> list[str]:
        """The thresholds to use as `key=value`."""
        return [
            f"eval.{name}={json.dumps(getattr(self.thresholds, name))}" for name in self.winner.chosen(self.has_nms)
        ]

    def summary(self, objective: str) -> list[str]:
        """Return lines that say what was found."""
        found = self.comparison
        low, middle, high = found.gain
        verdict = "it is kept" if found.is_better else "it is not better there: the default stays"
        if self.not_stored:
            verdict = f"it is not stored, as {self.not_stored}: add {' '.join(self.overrides)}"
        return [
            f"{len(self.values)} settings in {self.seconds:.1f} s; the best: "
            + "  ".join(f"{name} {value}" for name, value in self.winner.chosen(self.has_nms).items()),
            f"{objective} on the images held out: default {found.default:.4f}, winner {found.winner:.4f}, "
            f"gain {middle:+.4f} (95 %: {low:+.4f} to {high:+.4f}); {verdict}",
        ]


def tune_nms(
    path: str | Path,
    *,
    recipe: str | None = None,
    model: nn.Module | None = None,
    trust_code: bool = False,
    overrides: Sequence[str] = (),
    objective: str = MAIN_METRIC,
    precision: float | None = None,
    trials: int = 200,
    seed: int = 0,
    out: str | Path | None = None,
    debug: bool = False,
    device: str | None = None,
    verbose: bool = False,
    say: Callable[[str], Any] = print,
) -> Tuned:
    """Search for the thresholds by which a checkpoint detects best, and store them in it.

    Args:
        path: folder of a checkpoint, or of a run, whose best checkpoint is taken, or a weights file. Nothing is stored
            in a weights file.
        recipe: recipe of the data and, for a weights file, of the model; None: the recipe of the run.
        model: a detector of your own, where the checkpoint is of one.
        trust_code: run the code that the checkpoint names as its model, and the recipe of its run to read the data.
        overrides: `section.key=value`.
        objective: metric to maximise, one of raydet.tuning.thresholds.OBJECTIVES.
        precision: only settings by which at least this share of the detections is right at IoU 0.50; None: any.
        trials: number of settings to try.
        seed: seed of the settings, of the halves of the images and of the bootstrap.
        out: folder for the table and the picture; None: the checkpoint's, or for a weights file this one.
        debug: run in this process, without Ray.
        device: device to run on, with `debug`.
        verbose: let Ray print what its workers print.
        say: takes each line of progress.

    Raises:
        RaydetError: something in the checkpoint, the recipe or the data cannot work.
    """
    if trials < 1:
        raise RaydetError(f"trials is {trials}: it must be at least 1")
    recipe = own_recipe(path, recipe)
    with opened(path) as local:
        job, index = open_evaluation(local, recipe, model, overrides, say, trust_code)
        # Published weights are a checkpoint for the time of this command: what is found is not stored in them.
        source = checkpoint.find(local) if local.is_dir() and not is_published(path) else None
        weights = local / checkpoint.WEIGHTS if local.is_dir() else local
        file = _candidates(source or weights, job, index, debug, device, verbose, say)
        candidates = CandidateSet(file, index, job.config.image_size, job.config.preprocessing.resize)
        has_nms = post_prediction(job.model, job.recipe.eval).has_nms
        if not has_nms:
            say(f"the model has no NMS: {', '.join(OF_NMS)} are left out of the search")
        search = Search(candidates, objective, precision, seed, job.recipe.eval.max_dets, has_nms)
        default = Setting.of(job.recipe.eval)
        work = groups(trials, default, seed, has_nms)
        count = sum(map(len, work))
        say(f"{count} settings, of {len(work)} NMS, on {len(search.halves['searched'])} of the {len(index)} images")
        began = time.monotonic()
        tell = _progress(len(work), say)
        if debug:
            values = []
            for group in work:
                values += _measure(search, group)
                tell()
        else:
            values = _on_ray(search, work, job.recipe, verbose, tell)
        seconds = time.monotonic() - began
        values.sort(key=lambda entry: entry[0], reverse=True)
        winner = values[0][1]
        comparison = search.compare(default, winner)
        thresholds = job.recipe.eval
        if comparison.is_better:
            thresholds = thresholds.model_copy(update=winner.chosen(has_nms))
        not_stored = ""
        if comparison.is_better:
            not_stored = _why_not_stored(source, job)
            if source is not None and not not_stored:
                checkpoint.set_thresholds(source, thresholds)
        folder = Path(out) if out is not None else source or Path()
        tuned = Tuned(thresholds, winner, comparison, values, seconds, folder, not_stored, has_nms)
        _write(tuned, search)
        return tuned


def _why_not_stored(source: Path | None, job: Job) -> str:
    """Return why a checkpoint, None: a weights file, is not to have thresholds that are better; empty: it is."""
    if source is None:
        return "a weights file keeps no thresholds"
    ours, own = (
        "x".join(map(str, size)) for size in (job.config.image_size, checkpoint.read_config(source).image_size)
    )
    return "" if ours == own else f"the checkpoint is used at {own} pixels, not at {ours}"


def _candidates(
    source: Path, job: Job, index: Index, debug: bool, device: str | None, verbose: bool, say: Callable[[str], Any]
) -> Path:
    """Return the file of the candidates: an earlier one of the same weights and data, or one made now."""
    weights = source / checkpoint.WEIGHTS if source.is_dir() else source
    digest = hashlib.sha256(weights.read_bytes())
    digest.update(index.save())
    digest.update(repr((job.config.image_size, job.config.preprocessing, FLOOR, TOP_K)).encode())
    folder = source if source.is_dir() else cache.folder()
    file = folder / f"candidates-{digest.hexdigest()[:16]}.parquet"
    if file.is_file():
        say(f"candidates of an earlier search: {file}")
        return file
    began = time.monotonic()
    then = partial(keep, file=file)
    run_evaluation(candidates_loop, job, debug, device, verbose, say, then)
    say(f"candidates of {len(index)} images in {time.monotonic() - began:.1f} s: {file}")
    return file


def _progress(total: int, say: Callable[[str], Any]) -> Callable[[], None]:
    """Return what is to be called after each NMS; it says now and then how many are done."""
    done, due = 0, time.monotonic() + PROGRESS_EVERY_S

    def tell() -> None:
        nonlocal done, due
        done += 1
        if time.monotonic() > due:
            say(f"{done} of {total} NMS")
            due = time.monotonic() + PROGRESS_EVERY_S

    return tell


def _measure(search: Search, group: list[Setting]) -> list[tuple[float, Setting]]:
    return [(search.value(setting, search.halves["searched"]), setting) for setting in group]


def _on_ray(
    search: Search, work: list[list[Setting]], recipe: Recipe, verbose: bool, tell: Callable[[], None]
) -> list[tuple[float, Setting]]:
    """Measure all settings by Ray Tune, a trial for those of one NMS, on every CPU of the cluster."""
    prepare_tune()
    import ray
    from ray import tune

    class SettingsTrial(tune.Trainable):  # type: ignore[misc]
        """An actor that goes on to the next NMS without being made anew."""

        def setup(self, config: dict[str, Any], search: Search, work: list[list[Setting]]) -> None:
            import torch

            torch.set_num_threads(1)
            self.search, self.work, self.number = search, work, config["number"]

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.number = new_config["number"]
            return True

        def step(self) -> dict[str, Any]:
            found = _measure(self.search, self.work[self.number])
            return {"values": [value for value, _ in found], "best": max(found, key=lambda e: e[0])[0], "done": True}

    class Tell(tune.Callback):  # type: ignore[misc]
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            tell()

    with ExitStack() as stack:
        if connect(recipe.scale, verbose):
            stack.callback(ray.shutdown)
        notes = stack.enter_context(tempfile.TemporaryDirectory(prefix="raydet-tune-nms-"))
        tuner = tune.Tuner(
            tune.with_parameters(SettingsTrial, search=search, work=work),
            param_space={"number": tune.grid_search(list(range(len(work))))},
            tune_config=tune.TuneConfig(metric="best", mode="max", reuse_actors=True),
            run_config=tune.RunConfig(
                name="tune-nms",
                storage_path=notes,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[Tell()],
                verbose=0,
            ),
        )
        results = tuner.fit()
        if results.num_errors:
            raise RaydetError(f"a trial failed: {results.errors[0]}")
        values = []
        for result in results:
            group = work[result.metrics["config"]["number"]]
            values += list(zip(result.metrics["values"], group, strict=True))
        return values


def _write(tuned: Tuned, search: Search) -> None:
    """Write all values, and a picture of them over score and IoU thresholds around the winner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    store = Store(tuned.folder)
    content = {
        "objective": search.objective,
        "thresholds": {name: getattr(tuned.thresholds, name) for name in SPACE},
        "held out": asdict(tuned.comparison),
        "searched": [{"value": value, **asdict(setting)} for value, setting in tuned.values],
    }
    store.write(TABLE, (json.dumps(content, indent=1) + "\n").encode())
    scores, ious = SPACE["score"], SPACE["iou"] if search.has_nms else (tuned.winner.iou,)
    rows = search.halves["searched"]
    surface = np.array(
        [[search.value(replace(tuned.winner, iou=iou, score=score), rows) for score in scores] for iou in ious]
    )
    figure = Figure(figsize=(10, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(surface, origin="lower", aspect="auto", cmap="viridis")
    for (row, column), value in np.ndenumerate(surface):
        dark = value < (surface.min() + surface.max()) / 2
        axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="white" if dark else "black", fontsize=7)
    axes.set_xticks(range(len(scores)), [f"{score:g}" for score in scores])
    axes.set_yticks(range(len(ious)), [f"{iou:.2f}" for iou in ious])
    if tuned.winner.score in scores and tuned.winner.iou in ious:
        axes.plot(scores.index(tuned.winner.score), ious.index(tuned.winner.iou), "o", mfc="none", mec="red", ms=30)
    others = {name: value for name, value in asdict(tuned.winner).items() if name not in ("score", "iou")}
    axes.set(
        xlabel="score threshold",
        ylabel="IoU threshold of NMS" if search.has_nms else "without NMS",
        title=", ".join(f"{k} {v}" for k, v in others.items()),
    )
    figure.colorbar(image, label=f"{search.objective}, images searched on")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    store.write(PICTURE, picture.getvalue())
