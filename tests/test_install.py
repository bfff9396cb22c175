"""The built wheel, installed by pip into a folder that is not the checkout, and used there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tcsae import __version__

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` of the wheel puts in place; what it stands on is here already."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(folder), str(wheel)], check=True, timeout=120)
    return folder


def installed(site: Path, work: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command `tcsae` of the installed package, in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(site), "TCSAE_STORE": str(work / "store")}
    command = [str(site / "bin" / "tcsae"), *arguments]
    return subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_wheel_has_its_version_and_every_file_of_the_configuration(wheel: Path) -> None:
    assert wheel.name == f"tcsae-{__version__}-py3-none-any.whl"
    files = set(zipfile.ZipFile(wheel).namelist())
    conf = REPOSITORY / "conf"
    shipped = {f"tcsae/conf/{f.relative_to(conf)}" for f in conf.rglob("*.yaml")}
    assert shipped == {f for f in files if f.startswith("tcsae/conf/")}
    code = {str(f.relative_to(REPOSITORY)) for f in (REPOSITORY / "tcsae").rglob("*.py")}
    assert code <= files
    assert {"tcsae/report/templates/run.html.j2", "tcsae/report/templates/page.js"} <= files
    assets = {f"tcsae/live/assets/{name}" for name in ("index.html", "live.css", "live.js")}
    assert {f for f in files if f.startswith("tcsae/live/assets/")} == assets


def test_it_composes_its_own_configuration(site: Path, tmp_path: Path) -> None:
    done = installed(site, tmp_path, "train", "--cfg", "job", "window=12", "model=gemma")
    assert done.returncode == 0, done.stderr
    assert "window: 12" in done.stdout and "google/gemma-2-2b" in done.stdout


def test_it_trains_measures_and_compares_far_from_the_checkout(site: Path, tmp_path: Path) -> None:
    small = [
        "model=synthetic",
        "sae.d_sae=128",
        "training.tokens=8192",
        "dataset.n_contexts=64",
        "dataset.n_eval_contexts=32",
        "evaluation=quick",
        "tracking=disabled",
    ]
    done = installed(site, tmp_path, "train", "+experiment=pair", *small)
    assert done.returncode == 0, done.stderr
    infos = list(tmp_path.glob("multirun/*/*/final_info.json"))
    assert len(infos) == 2
    for info in infos:
        assert json.loads(info.read_text())["training_steps"] > 0
    assert list(tmp_path.glob("multirun/*/comparison/report.html"))
    where = "import tcsae; print(tcsae.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run(
        [sys.executable, "-c", where],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(site)
