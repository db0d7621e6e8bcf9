"""Runs on Weights & Biases, read back from what its own client has written offline."""

import json
import os
import struct
import subprocess
import sys

import pytest
from wandb.proto import wandb_internal_pb2 as protobuf

import raydet


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return monkeypatch


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
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def test_a_run_s_metrics_recipe_and_group_are_there(demo, environment):
    wanted = ["track.wandb=true", "track.wandb_project=birds", "track.wandb_group=sweep", "train.epochs=1"]
    result = raydet.train("demo", overrides=[*demo, *wanted], debug=True, device="cpu", say=print)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    sent = [{key: value for key, value in line.items() if not key.startswith("_")} for line in history(result.folder)]
    assert sent == lines
    (run,) = [record.run for record in records(result.folder) if record.WhichOneof("record_type") == "run"][-1:]
    assert (run.project, run.run_group, run.display_name) == ("birds", "sweep", "demo-debug")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["train"]["epochs"] == 1
    assert config["loss"]["iou_weight"] == 5.0
    ends = [record.exit.exit_code for record in records(result.folder) if record.WhichOneof("record_type") == "exit"]
    assert ends == [0]


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
