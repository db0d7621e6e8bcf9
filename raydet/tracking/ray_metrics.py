"""A training's figures as metrics of the Ray cluster, which Prometheus and Grafana read beside Ray's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raydet.visualization import Shown


class RayMetrics:
    """Gauges `ray_raydet_…` with the tag `run`, as they were last logged.

    Args:
        run: name of the run.
        batch_size: number of images of a step, of all ranks.
    """

    def __init__(self, run: str, batch_size: int):
        from ray.util.metrics import Gauge

        self._batch_size = batch_size
        self._gauges = {
            key: Gauge(f"raydet_{name}", description=description, tag_keys=("run",)).set_default_tags({"run": run})
            for key, (name, description) in {
                "train/loss": ("loss", "Mean loss since the line before"),
                "perf/images_per_s": ("images_per_second", "Images a second, of all workers"),
                "perf/data_wait": ("data_wait_ratio", "Share of the time in which rank 0 waits for data"),
                "step": ("step_seconds", "Seconds a step takes, waiting for data included"),
            }.items()
        }

    def metrics(self, values: Mapping[str, float]) -> None:
        """Show a line of metrics.jsonl."""
        if speed := values.get("perf/images_per_s"):
            for key, gauge in self._gauges.items():
                if (value := self._batch_size / speed if key == "step" else values.get(key)) is not None:
                    gauge.set(value)

    def pictures(self, name: str, images: Sequence[Shown], class_names: Sequence[str], at: Mapping[str, float]) -> None:
        """Leave pictures out: a metric is a number."""

    def finish(self, *, failed: bool) -> None:
        """Leave the gauges, which end with the process."""
