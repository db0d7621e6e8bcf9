"""The search for thresholds on Ray: the same as in this process."""

from raydet.tuning.nms import tune_nms


def test_ray_tune_finds_what_is_found_without_it(shared, tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("RAYDET_CACHE", str(tmp_path / "cache"))
    weights = shared / "weights/yolox_nano/yolox_nano_coco.pth"
    data = [f"data.root={shared}/data/coco_mini", "data.max_num_samples=24", "data.image_size=256"]
    overrides = [*data, f"storage={tmp_path}", "scale.cpus_per_worker=1"]
    given = {"recipe": "coco2017_yolox_n", "objective": "F1@0.50", "trials": 20, "out": tmp_path}
    on_ray = tune_nms(weights, overrides=[*overrides, "scale.num_workers=2"], **given, say=print)
    (candidates,) = tmp_path.glob("cache/candidates-*.parquet")
    candidates.unlink()
    here = tune_nms(weights, overrides=overrides, **given, debug=True, device="cpu", say=print)
    assert here.values == on_ray.values
    assert here.comparison == on_ray.comparison
