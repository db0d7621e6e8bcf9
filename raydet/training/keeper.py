"""What a training keeps: checkpoints when they are due, batches that went wrong, validations that ran elsewhere.

All ranks have one; rank 0's does the work.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raydet.data.batch import Batch
from raydet.devices import agreed
from raydet.errors import RaydetError, first_line, user_error
from raydet.runs import checkpoint
from raydet.runs.checkpoint import Progress
from raydet.runs.folder import STOP
from raydet.runs.log import drop_metrics_after, replay
from raydet.training.job import Run, Validated, ValidationBeside
from raydet.training.meter import validation_line
from raydet.training.step import Outcome

_LOOK_EVERY_S = 0.2
_WAIT_SAID_EVERY_S = 30.0


class Keeper:
    """Writes a run's checkpoints and knows when one is due, when the training ends early, and why.

    Args:
        run: the training on this rank.
        average: the model whose weights are kept.
        trained: what else has a state that a training is resumed from, by name.
    """

    def __init__(self, run: Run, average: nn.Module, trained: Mapping[str, Any]):
        self._job, self._world, self._log = run.job, run.world, run.log
        self._average, self._trained = average, trained
        self._leader = run.leader
        self._bad_batches = run.job.folder / "not_finite"
        self._looked = self._saved = time.monotonic()
        self._told = self._over = self._warned = False
        self._last = ""  # name of the last checkpoint
        # Validations beside the training, one at a time: checkpoints that wait for theirs, and the one that runs.
        self._awaited: list[Path] = []
        self._validation: ValidationBeside | None = None
        self._heard = 0.0  # when it last gave a sign of life
        self._metrics: dict[str, float] = {}  # what the last of them has found

    def begin(self, state: Progress, damaged: list[str]) -> None:
        """Say which checkpoints cannot be used, drop what will be logged again, and take up awaited validations."""
        if self._leader:
            for problem in damaged:
                self._log.say(f"warning: {problem}; going on from the one before it")
            drop_metrics_after(self._job.folder, state.step)
            self._awaited = checkpoint.awaited(self._job.folder)

    def asked(self, state: Progress) -> tuple[bool, bool, bool, bool]:
        """Return rank 0's flags: after this step stop, keep a checkpoint, end as it gets no better, go on elsewhere."""
        track = self._job.recipe.track
        due = track.checkpoint_steps is not None and (state.step + 1) % track.checkpoint_steps == 0
        if not self._leader:
            return False, due, False, False
        now = time.monotonic()
        due = due or (track.checkpoint_minutes is not None and now - self._saved > 60 * track.checkpoint_minutes)
        if now - self._looked > _LOOK_EVERY_S:
            self._looked = now
            self._told = (self._job.folder / STOP).exists()
            self._collect(state)
        leaves = False
        if not self._warned and (lost := self._world.ranks_to_lose()):
            self._warned = due = True
            leaves = self._world.size - lost >= self._job.recipe.scale.workers[0]
            then = "the training goes on without it" if leaves else "the training goes on until it is gone"
            self._log.say(f"a node of this training is about to be taken away: keeping a checkpoint; {then}")
        return self._told, due, self._over, leaves

    def judge(self, state: Progress, metrics: Mapping[str, float]) -> bool:
        """Take note of a validation's metrics; return whether the training is to end, as it gets no better.

        Raises:
            RaydetError: the metric to watch is not among them.
        """
        watch, min_delta = self._job.recipe.eval.watch, self._job.recipe.eval.min_delta
        value = metrics.get(f"val/{watch}")
        if value is None:
            raise RaydetError(f"eval.watch: the validation data gives no {watch}, only {', '.join(metrics)}")
        if value > state.best + min_delta or state.best < 0:
            state.best, state.stale = value, 0
        else:
            state.stale += 1
        over = self.patience_is_over(state)
        if over and self._leader:
            self._log.say(f"{watch} has not been better than {state.best:.4f} in {state.stale} validations: the end")
        return over

    def patience_is_over(self, state: Progress) -> bool:
        """Has it not become better for too long?"""
        patience = self._job.recipe.eval.patience
        return patience is not None and state.stale >= patience

    def save(self, state: Progress, metrics: Mapping[str, float], awaited: bool = False) -> None:
        """Keep a checkpoint.

        A disk that is full costs this checkpoint, not the training: the ones before it stay.

        Args:
            state: where the training stands.
            metrics: metrics of a validation of these weights.
            awaited: will the weights be validated beside the training?
        """
        self._saved = time.monotonic()
        if not self._leader:
            return
        epoch = self._job.epoch_of(state.position)
        ends_epoch = epoch > self._job.epoch_of(state.position - self._job.batch_size(self._world.size))
        name = f"checkpoint_{epoch:06d}" + ("" if ends_epoch else f"_{state.step:08d}")
        trained = {name: part.state_dict() for name, part in self._trained.items()}
        folder = self._job.folder / name
        packed = checkpoint.pack(self._job.config, self._average, trained, state, epoch, metrics, awaited)
        try:
            checkpoint.write(folder, packed)
        except OSError as error:
            size = sum(map(len, packed.values())) / 1e6
            self._log.say(
                f"warning: {name} ({size:.0f} MB) cannot be kept: {error.strerror}. The checkpoints before it stay; "
                f"free the disk of {self._job.folder}"
            )
            return
        self._last = name
        checkpoint.prune(self._job.folder, self._job.recipe.track.keep_checkpoints)
        if not ends_epoch:
            self._log.say(f"checkpoint: {name}")
        if awaited:
            self._awaited.append(folder)

    def stopped(self, state: Progress) -> None:
        """Say that the training was told to stop, and what it will go on from."""
        if self._validation is not None:
            self._validation.cancel()
        if self._leader:
            last = f"from {self._last}" if self._last else "with no checkpoint"
            self._log.say(f"stopped after step {state.step}; the same command goes on {last}")

    def check_last(self, state: Progress) -> None:
        """Make sure that the end of the training is kept.

        Raises:
            RaydetError: it is not.
        """
        if not self._leader:
            return
        last, _ = checkpoint.latest(self._job.folder)
        if last is None or checkpoint.position(last) < state.position:
            raise RaydetError(
                f"{self._job.folder}: the last checkpoint could not be kept; free the disk and run the same command "
                f"again: it goes on from {last.name if last else 'the beginning'}"
            )

    def save_average(self, state: Progress, metrics: Mapping[str, float]) -> None:
        """Keep the average of the best checkpoints, which the model holds, as a checkpoint of its own."""
        if not self._leader:
            return
        epoch = self._job.epoch_of(state.position)
        shown = {f"average/{name.removeprefix('val/')}": value for name, value in metrics.items()}
        self._log.metrics(step=state.step, epoch=epoch, **shown)
        packed = checkpoint.pack(self._job.config, self._average, None, state, epoch, metrics)
        try:
            checkpoint.write(self._job.folder / checkpoint.AVERAGE, packed)
        except OSError as error:
            self._log.say(f"warning: {checkpoint.AVERAGE} cannot be kept: {error.strerror}")

    def skipped(self, state: Progress, outcome: Outcome, batch: Batch) -> None:
        """Take note of a step that was skipped.

        Raises:
            RaydetError: too many in a row were.
        """
        if outcome.overflow:
            return
        state.bad += 1
        if outcome.suspect:
            self._keep_batch(state, batch)
        if state.bad >= self._job.recipe.train.max_bad_steps:
            raise RaydetError(
                f"the loss or its gradient was not finite in {state.bad} steps in a row, the last being {state.step}: "
                f"log.txt names their images, {self._bad_batches} holds them; lower train.lr, set "
                "train.clip_grad_norm, or train.precision=fp32"
            )

    def _keep_batch(self, state: Progress, batch: Batch) -> None:
        """Keep this rank's batch, whose loss or gradient was not finite, and name its images."""
        paths = self._world.paths(batch.rows.tolist())
        path = self._bad_batches / f"step_{state.step:08d}_rank_{self._world.rank}.pt"
        kept = {"images": batch.images, "targets": batch.targets, "positions": batch.positions, "paths": paths}
        where = f"the batch is {path}"
        try:
            path.parent.mkdir(exist_ok=True)
            torch.save(kept, path)
        except (OSError, RuntimeError) as error:
            where = f"the batch could not be kept: {error}"
        self._log.say(
            f"warning: step {state.step}: the loss or its gradient is not finite; the step is skipped. Images of rank "
            f"{self._world.rank}: {', '.join(paths)}; {where}"
        )

    def wait_for_validations(self, state: Progress) -> dict[str, float]:
        """Wait for the validations beside the training; return the last one's metrics on every rank."""
        said = time.monotonic()
        while agreed(bool(self._awaited)):
            self._world.beat()
            if self._leader:
                self._collect(state)
                if self._awaited and time.monotonic() - said > _WAIT_SAID_EVERY_S:
                    said = time.monotonic()
                    self._log.say(f"waiting for the validation of {', '.join(path.name for path in self._awaited)}")
            time.sleep(0.2)
        return agreed(self._metrics)  # type: ignore[no-any-return]

    def _collect(self, state: Progress) -> None:
        """Take over what the validation beside the training has found, and start the next."""
        if not self._awaited:
            return
        folder = self._awaited[0]
        try:
            came = self._poll(folder)
        except Exception as error:  # whatever it is, the training goes on without these metrics
            self._log.say(f"warning: the validation of {folder.name} failed: {user_error(error) or first_line(error)}")
            self._keep_metrics(folder, {})
            self._ended(folder)
            return
        for item in came:
            if isinstance(item, str):
                self._log.say(item)
            else:
                self._ended(folder)
                self._validated(folder, item, state)

    def _poll(self, folder: Path) -> Sequence[str | Validated]:
        """Return what has come of the validation of a checkpoint, which is started if it has not been."""
        now = time.monotonic()
        if self._validation is None:
            content = checkpoint.read_json(folder / checkpoint.CONFIG)
            weights = (folder / checkpoint.WEIGHTS).read_bytes()
            assert self._world.validate is not None
            self._validation = self._world.validate(weights, content["epoch"], content["step"])
            self._heard = now
        came = self._validation.poll()
        if came:
            self._heard = now
        elif now - self._heard > 60 * self._job.recipe.scale.hang_minutes:
            self._validation.cancel()
            raise RaydetError(f"no sign of life for {now - self._heard:.0f} s (scale.hang_minutes)")
        return came

    def _ended(self, folder: Path) -> None:
        self._validation = None
        self._awaited.remove(folder)

    def _validated(self, folder: Path, found: Validated, state: Progress) -> None:
        content = checkpoint.read_json(folder / checkpoint.CONFIG)
        epoch, step = content["epoch"], content["step"]
        self._metrics = found.metrics
        replay(found.logged, self._log)
        self._log.metrics(step=step, epoch=epoch, **found.metrics, **{"perf/val_s": found.seconds})
        self._log.say(validation_line(f"epoch {epoch}", found.metrics, found.seconds))
        self._keep_metrics(folder, found.metrics)
        self._over = self.judge(state, found.metrics)
        checkpoint.prune(self._job.folder, self._job.recipe.track.keep_checkpoints)

    def _keep_metrics(self, folder: Path, metrics: Mapping[str, float]) -> None:
        try:
            checkpoint.set_metrics(folder, metrics)
        except OSError as error:
            self._log.say(f"warning: the metrics of {folder.name} cannot be kept: {error.strerror}")
