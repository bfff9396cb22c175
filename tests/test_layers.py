"""The house stands: imports run down, nothing lies loose at the top, no two modules in a circle."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from helpers import SLOW

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import house  # noqa: E402


def test_every_import_runs_down() -> None:
    up = [f"{a.file}:{a.line}: {a.source} -> {a.target}" for a in house.arrows() if house.wrong(a)]
    assert up == []


def test_every_package_has_a_floor() -> None:
    packages = {path.name for path in (ROOT / "tcsae").iterdir() if (path / "__init__.py").exists()}
    assert packages == {name for rooms in house.FLOORS for name in rooms} - {"doors"}


def test_nothing_lies_loose_at_the_top() -> None:
    found = {path.stem for path in (ROOT / "tcsae").glob("*.py")}
    assert found == set(house.TOP)


def test_no_module_is_in_a_circle() -> None:
    known = house.modules(ROOT)
    # What runs when a module is imported: top-level imports, TYPE_CHECKING blocks left out.
    needs = {name: _top_imports(path, set(known)) - {name} for name, path in known.items()}
    open_names, done = [], set()

    def visit(name: str) -> None:
        assert name not in open_names, " -> ".join([*open_names, name])
        if name in done:
            return
        open_names.append(name)
        for needed in sorted(needs[name]):
            visit(needed)
        open_names.pop()
        done.add(name)

    for name in known:
        visit(name)


def _top_imports(path: Path, known: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= set(house._targets(node, dict.fromkeys(known, path)))
    # A package's __init__ is a page of names, not something its modules stand on.
    return {name for name in found & known if path.parent.name not in name.split(".")[-1:]}


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ("from tcsae.report import page", True),
        ("import tcsae.train", True),
        ("from tcsae.base.files import read_json", False),
        ("from tcsae.sae import topk", False),
    ],
)
def test_an_import_that_runs_up_is_seen(tmp_path: Path, text: str, is_wrong: bool) -> None:
    for name in ("report/page", "train", "base/files", "sae/topk", "sae/new"):
        file = tmp_path / "tcsae" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"def f():\n    {text}\n" if name == "sae/new" else "")
    assert [house.wrong(arrow) for arrow in house.arrows(tmp_path)] == [is_wrong]


def test_every_file_on_the_list_of_slow_ones_is_there() -> None:
    assert [name for name in SLOW if not (Path(__file__).parent / name).is_file()] == []
