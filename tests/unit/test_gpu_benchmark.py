"""`python -m benchmarks.gpu`, the first ten minutes on a GPU, as it runs without one."""

import json

import pytest
import torch

from benchmarks import gpu


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    code = gpu.main(["--device", "cpu", "--quick", "--minutes", "20", "--json", str(file)])
    assert code == 0
    return json.loads(file.read_text())["lines"]


def test_nothing_fails(lines):
    assert [line for line in lines if line["verdict"] == "failed"] == []


def test_every_line_says_what_is_expected_and_what_was_found(lines):
    assert all(line["expected"] and (line["found"] or line["subject"]) for line in lines)
    assert {line["verdict"] for line in lines} <= {"met", "missed", "not run"}


@pytest.mark.parametrize("name", gpu.QUICK_MODELS)
def test_each_family_computes_the_same_in_either_memory_layout(lines, name):
    parity = [line for line in lines if line["subject"] == name and line["check"].startswith("fp32 ")]
    assert [line["verdict"] for line in parity] == ["met", "met"]


@pytest.mark.parametrize("check", ["AdamW's counters, resumed", "two processes, gloo", "compiled loss beside eager"])
def test_what_needs_no_gpu_is_met(lines, check):
    found = [line for line in lines if line["check"] == check]
    assert found
    assert {line["verdict"] for line in found} == {"met"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_what_needs_a_gpu_says_so(lines):
    waiting = [line for line in lines if line["verdict"] == "not run"]
    assert {line["check"] for line in waiting} == {
        "device",
        "waits for the device",
        "copies to the device",
        "a batch that does not fit",
    }
    assert {line["found"] for line in waiting} == {gpu.NO_CUDA}


def test_a_check_that_raises_is_a_line_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(gpu, "checks", lambda bench: [("broken", "x", broken), ("next", "y", lambda: None)])
    assert gpu.main(["--device", "cpu", "--json", str(tmp_path / "gpu.json")]) == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [line["found"] for line in content["lines"]] == ["RuntimeError: first line"]
    assert set(content["seconds"]) == {"broken x", "next y"}


def test_no_check_begins_when_the_time_is_up(tmp_path):
    gpu.main(["--device", "cpu", "--quick", "--minutes", "-1", "--json", str(tmp_path / "gpu.json")])
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["seconds"] == {}
    assert {line["verdict"] for line in content["lines"]} == {"not run"}
