"""The package as others get it: built, installed into an environment of its own, run in an empty folder."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import raydet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the source distribution, and of the wheel that is built from it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "raydet", source / "raydet", ignore=shutil.ignore_patterns("__pycache__"))
    out = source / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def run(built, tmp_path_factory):
    """Run a command of an environment that has the wheel, and the packages that it needs, but not this folder."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (wheel,) = built.glob("*.whl")
    python = environment / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (packages,) = (environment / "lib").glob("python3*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib"))
    folder = tmp_path_factory.mktemp("empty")

    def command(name, *arguments):
        return subprocess.run(
            [str(environment / "bin" / name), *arguments], cwd=folder, capture_output=True, text=True, check=False
        )

    return command


def test_what_is_built_can_be_published(built):
    files = sorted(map(str, built.iterdir()))
    assert [Path(file).name for file in files] == [
        f"raydet-{raydet.__version__}-py3-none-any.whl",
        f"raydet-{raydet.__version__}.tar.gz",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_wheel_trains_and_detects_in_an_empty_folder(run):
    where = run("python", "-c", "import raydet; print(raydet.__file__)").stdout
    assert "environment" in where
    assert run("raydet", "--version").stdout == f"raydet {raydet.__version__}\n"
    assert "yolox_finetune" in run("raydet", "recipes").stdout
    made = run("python", "-m", "raydet.data.synthetic", "data/shapes", "--train", "16", "--val", "8")
    assert made.returncode == 0, made.stderr
    trained = run("raydet", "train", "demo", "--debug", "data.image_size=96", "train.batch_size=8", "name=own")
    assert trained.returncode == 0, trained.stderr
    found = run("raydet", "predict", "runs/own-debug", "data/shapes/val", "--out", "found")
    assert found.returncode == 0, found.stderr
    assert "in 8 images" in found.stdout
