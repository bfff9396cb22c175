"""What an installed package carries, beside its modules."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_an_installed_package_finds_its_configuration_and_templates(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import tcsae.report.page, tcsae.train as train, sys;"
        "assert train.conf_folder().parts[-2:] == ('tcsae', 'conf'), train.conf_folder();"
        "sys.argv = ['train', '--cfg', 'job', 'window=12', 'model=gemma']; train.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "window: 12" in done.stdout and "google/gemma-2-2b" in done.stdout
    shipped = {f.relative_to(REPOSITORY / "conf") for f in (REPOSITORY / "conf").rglob("*.yaml")}
    installed = tmp_path / "site" / "tcsae" / "conf"
    assert {f.relative_to(installed) for f in installed.rglob("*.yaml")} == shipped
    templates = [f.name for f in (tmp_path / "site" / "tcsae" / "report" / "templates").iterdir()]
    assert "run.html.j2" in templates and "page.js" in templates
    assets = {f.name for f in (tmp_path / "site" / "tcsae" / "live" / "assets").iterdir()}
    assert assets == {"index.html", "live.css", "live.js"}
