"""Runs on Weights & Biases and TensorBoard, read back from what their own clients have written."""

import json
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from wandb.proto import wandb_internal_pb2 as protobuf

import raydet
from raydet.tracking.tensorboard import TensorBoardRun


def records(folder):
    """All records of the runs in a folder: a LevelDB log in blocks of 32 KiB."""
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, position, buffer = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[position : position + 7])
            position += 7
            if kind == 0:
                break
            buffer += data[position : position + length]
            position += length
            if kind in (1, 4):  # whole, or the last part
                record = protobuf.Record()
                record.ParseFromString(buffer)
                buffer = b""
                yield record


def history(folder):
    """All lines that were logged; what is more than a number is a dict."""
    lines = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            lines.append({})
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                lines[-1][name] = {**lines[-1].get(name, {}), inner[0]: value} if inner else value
    return lines


@pytest.fixture(scope="module")
def tracked_run(shapes, tmp_path_factory):
    """A run of two epochs that went to both, the log of W&B's client, and what was said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        folder = tmp_path_factory.mktemp("tracked")
        wanted = [
            "wandb=true",
            "wandb_project=birds",
            "wandb_group=sweep",
            "wandb_checkpoints=true",
            "tensorboard=true",
        ]
        overrides = [f"data.root={shapes}", f"storage={folder}", "data.image_size=96", "train.epochs=2"]
        overrides += [f"track.{setting}" for setting in wanted]
        result = raydet.train("demo", overrides=overrides, debug=True, device="cpu", say=print)
        yield result.folder, list(records(result.folder))


def of_kind(run, kind):
    return [getattr(record, kind) for record in run[1] if record.WhichOneof("record_type") == kind]


def test_metrics_are_those_of_the_run_s_folder(tracked_run):
    lines = [json.loads(line) for line in (tracked_run[0] / "metrics.jsonl").read_text().splitlines()]
    known = {key for line in lines for key in line}
    sent = [{key: value for key, value in line.items() if key in known} for line in history(tracked_run[0])]
    assert [line for line in sent if set(line) - {"step", "epoch"}] == lines


def test_recipe_project_and_group_are_there_and_the_run_is_finished(tracked_run):
    run = of_kind(tracked_run, "run")[-1]
    assert (run.project, run.run_group, run.display_name) == ("birds", "sweep", "demo-debug")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["train"]["epochs"] == 2
    assert config["loss"]["iou_weight"] == 5.0
    assert [end.exit_code for end in of_kind(tracked_run, "exit")] == [0]


def test_metrics_of_steps_and_of_epochs_have_their_axes(tracked_run):
    axes = {metric.glob_name: metric.step_metric for metric in of_kind(tracked_run, "metric") if metric.glob_name}
    assert axes == {"train/*": "step", "perf/*": "step", "valid/*": "step", "val/*": "epoch"}


def media(folder, kind):
    return [value for line in history(folder) for value in line.values() if is_of(value, kind)]


def is_of(value, kind):
    return isinstance(value, dict) and value.get("_type") == kind


def test_pictures_have_boxes_in_pixels_of_truth_and_of_detections(tracked_run):
    folder, _ = tracked_run
    (files,) = folder.glob("wandb/offline-run-*/files")
    names = {name for line in history(folder) for name, value in line.items() if is_of(value, "images/separated")}
    assert names == {
        "train/batch_0",
        *(f"valid/{end}_mAP@0.50:0.95_{what}" for end in ("min", "max") for what in ("batch", "images")),
    }
    truth, found = [], []
    for entry in media(folder, "images/separated"):
        assert len(entry["captions"]) == entry["count"] == len(entry["all_boxes"])
        for image, boxes in zip(entry["filenames"], entry["all_boxes"], strict=True):
            height, width = cv2.imread(str(files / image)).shape[:2]
            for kind, into in (("ground_truth", truth), ("predictions", found)):
                content = json.loads((files / boxes[kind]["path"]).read_text()) if kind in boxes else {"box_data": []}
                into += [(box, content["class_labels"], width, height) for box in content["box_data"]]
    for box, names, width, height in truth + found:
        position = box["position"]
        assert box["domain"] == "pixel"
        assert names[str(box["class_id"])] in {"disc", "square", "triangle", "ring", "cross"}
        assert position["minX"] < width
        assert position["minY"] < height
        assert max(position.values()) > 1
    assert truth
    assert all(0 <= box["scores"]["score"] <= 1 and "box_caption" in box for box, *_ in found)


def test_ap_of_the_classes_is_a_table_of_each_validation(tracked_run):
    folder, _ = tracked_run
    (files,) = folder.glob("wandb/offline-run-*/files")
    tables = [json.loads((files / entry["path"]).read_text()) for entry in media(folder, "table-file")]
    lines = [line for line in history(folder) if "val/mAP@0.50:0.95" in line]
    assert len(tables) == len(lines) > 0
    for table, line in zip(tables, lines, strict=True):
        assert table["columns"] == ["class", "AP@0.50:0.95"]
        assert table["data"]
        assert all(line[f"val/AP@0.50:0.95_{name}"] == value for name, value in table["data"])


def test_curves_and_the_best_checkpoint_are_there(tracked_run):
    folder, _ = tracked_run
    assert [line["curves"]["_type"] for line in history(folder) if "curves" in line] == ["image-file"]
    (artifact,) = [artifact for artifact in of_kind(tracked_run, "artifact") if artifact.type == "model"]
    assert {entry.path for entry in artifact.manifest.contents} == {"config.json", "model.safetensors"}


def events(folder):
    """What TensorBoard shows: of the files in order, without what a later one does again."""
    shown = {}
    for path in sorted(folder.glob("tensorboard/events*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack("<Q", data[position : position + 8])
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 16 + length
            if event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            shown |= {(value.tag, event.step): value for value in event.summary.value}
    return shown


def test_tensorboard_has_the_metrics_and_the_pictures(tracked_run):
    shown = events(tracked_run[0])
    for line in (tracked_run[0] / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        for name in values.keys() - {"step", "epoch"}:
            tag = re.sub(r"[^-/\w.]", "_", name)  # as its client writes it
            assert shown[tag, values["step"]].simple_value == pytest.approx(values[name], rel=1e-6), name
    pictures = {name: value.image for (name, _), value in shown.items() if value.HasField("image")}
    assert "train/batch_0" in pictures
    assert all(image.width > 100 and image.encoded_image_string for image in pictures.values())


def test_tensorboard_forgets_what_a_resumed_training_does_again(tmp_path):
    first = TensorBoardRun(tmp_path, print)
    for step in range(1, 6):
        first.metrics({"step": step, "train/loss": 10.0})
    first.finish(failed=True)
    time.sleep(1.1)  # the files are named by the second
    second = TensorBoardRun(tmp_path, print)
    second.metrics({"step": 4, "train/loss": 1.0})
    second.finish(failed=False)
    losses = {step: value.simple_value for (_, step), value in events(tmp_path).items()}
    assert losses == {1: 10.0, 2: 10.0, 3: 10.0, 4: 1.0}


def test_files_that_cannot_be_written_are_said_once(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    said = []
    run = TensorBoardRun(tmp_path, said.append)
    for step in (1, 2):
        run.metrics({"step": step})
    run.finish(failed=False)
    (line,) = said
    assert line.startswith("warning: TensorBoard's files failed, the training goes on without: ")


def test_a_service_that_cannot_be_reached_is_said_once_and_stops_nothing(demo):
    """In a process of its own: W&B's client reads its environment once."""
    key = "0" * 40
    online = {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": key,
        "WANDB_INIT_TIMEOUT": "3",
    }
    arguments = ["train", "demo", *demo, "track.wandb=true", "train.epochs=1", "--debug", "--device", "cpu"]
    command = [sys.executable, "-m", "raydet.cli", *arguments]
    done = subprocess.run(command, env=os.environ | online, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Weights & Biases failed, the training goes on without") == 1
    assert key not in done.stdout + done.stderr
    folder = next(Path(option.removeprefix("storage=")) for option in demo if option.startswith("storage="))
    assert not [path for path in folder.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
