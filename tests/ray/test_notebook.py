"""docs/first_steps.ipynb, run in a kernel of its own; the stop button ends a training as Ctrl-C does."""

import asyncio
import re
import threading
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parents[2] / "docs/first_steps.ipynb"
SHORTER = {"train=480, val=120": "train=64, val=24", "train.epochs=22": "train.epochs=3", "trials=50": "trials=10"}


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after all cells, and what its cell of the training printed when it was stopped."""
    content = NOTEBOOK.read_text()
    for long, short in SHORTER.items():
        assert long in content
        content = content.replace(long, short)
    notebook = nbformat.reads(content, as_version=4)
    where = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    client = NotebookClient(notebook, timeout=240, resources=where)
    stopped = ""
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            if "raydet.train(" in cell.source:
                stopped = stop(client, cell, number)
            client.execute_cell(cell, number)
    return notebook, stopped


def stop(client, cell, number):
    """Execute a cell, press the stop button when its training has made steps, and return what it printed."""

    def press():
        while "step " not in text_of(cell):
            time.sleep(0.1)
        asyncio.run(client.km.interrupt_kernel())

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        client.execute_cell(cell, number)
    return text_of(cell)


def test_it_is_kept_without_what_its_cells_print():
    assert not any(cell.get("outputs") for cell in nbformat.read(NOTEBOOK, as_version=4).cells)


def test_the_stop_button_ends_the_training_with_a_checkpoint_and_the_cell_goes_on_from_there(executed):
    notebook, stopped = executed
    assert "stopping after this step, with a checkpoint" in stopped
    step = re.findall(r"stopped after step (\d+)", stopped)[-1]
    (again,) = [text_of(cell) for cell in notebook.cells if "raydet.train(" in cell.source]
    assert f"resumed after step {step}" in again
    assert re.search(r"epoch 3 validated .*mAP", again)


def test_pictures_are_shown(executed):
    notebook, _ = executed
    shown = [
        output
        for cell in notebook.cells
        if "PIL.Image." in cell.source
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 4
