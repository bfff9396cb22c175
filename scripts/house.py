"""The structure of tcsae/: floors, arrows between packages, lines, functions over 60 lines.

python scripts/house.py             what there is now
python scripts/house.py REVISION    the same of a commit, beside it

tests/test_layers.py holds the arrows to the floors.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("base",),
    ("config",),
    ("tensors",),
    ("products",),
    ("losses", "sae", "metrics", "data"),
    ("training", "measure"),
    ("meaning",),
    ("runs",),
    ("report",),
    ("jobs",),
    ("launch", "live"),
    ("doors",),
)
"""From the ground up: a package imports from floors below its own, and from itself."""
DOORS = (
    "train",
    "evaluate",
    "compare",
    "look",
    "serve",
    "steer",
    "status",
    "export",
    "clean",
    "dashboard",
    "cli",
    "__main__",
)
TOP = (*DOORS, "consistency", "__init__")
"""The files that may lie at the top of tcsae/."""
LONG_FUNCTION = 60


class Arrow(NamedTuple):
    """One import of ours: where it stands, from which room, to which room."""

    file: str
    line: int
    source: str
    target: str
    local: bool
    """Inside a function."""


def room(module: str) -> str:
    """The package of "tcsae.x.y"; the doors are one room, and consistency is one of the losses."""
    if module.endswith(".__main__"):
        return "doors"  # python -m tcsae.PACKAGE
    first = module.split(".")[1] if "." in module else "__init__"
    if first == "consistency":
        return "losses"
    return "doors" if first in DOORS or first == "__init__" else first


def modules(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted((root / "tcsae").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def arrows(root: Path = ROOT) -> Iterator[Arrow]:
    """Every import of tcsae's own modules, that of a package's own included."""
    known = modules(root)
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            for target in _targets(node, known):
                file = path.relative_to(root).as_posix()
                line = getattr(node, "lineno", 0)
                yield Arrow(file, line, room(name), room(target), id(node) in inner)


def _targets(node: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "tcsae")
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tcsae":
        for alias in node.names:
            if alias.name == "__version__":
                continue  # of the package itself: nothing stands below it
            full = f"{node.module}.{alias.name}"
            yield full if full in known else str(node.module)


def floor(name: str) -> int:
    """The number of a room's floor; -1 for a room that is on none."""
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), -1)


def wrong(found: Arrow) -> bool:
    """Whether an import does not run down."""
    if found.source == found.target:
        return False
    return not 0 <= floor(found.target) < floor(found.source)


def measured(root: Path) -> dict[str, int]:
    """The counts that the table shows."""
    paths = modules(root).values()
    texts = [path.read_text(encoding="utf-8") for path in paths]
    functions = [
        node
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    between = [arrow for arrow in arrows(root) if arrow.source != arrow.target]
    return {
        "lines": sum(len(text.splitlines()) for text in texts),
        "files": len(texts),
        "files at the top": len(list((root / "tcsae").glob("*.py"))),
        "packages": len({path.parent for path in paths}) - 1,
        "functions": len(functions),
        f"functions over {LONG_FUNCTION} lines": sum(
            (node.end_lineno or 0) - node.lineno >= LONG_FUNCTION for node in functions
        ),
        "files over 400 lines": sum(len(text.splitlines()) > 400 for text in texts),
        "imports of ours inside functions": sum(arrow.local for arrow in arrows(root)),
        "arrows between packages": len({(arrow.source, arrow.target) for arrow in between}),
        "mentions of Any": sum(text.count("Any]") + text.count(": Any") for text in texts),
    }


def at_revision(revision: str, folder: Path) -> Path:
    """tcsae/ of a commit, unpacked in `folder`."""
    packed = subprocess.run(
        ["git", "archive", revision, "tcsae"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def main() -> None:
    columns = {"now": measured(ROOT)}
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as place:
            columns = {sys.argv[1]: measured(at_revision(sys.argv[1], Path(place)))} | columns
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in columns["now"]:
        print(f"| {name} | " + " | ".join(f"{found[name]:,}" for found in columns.values()) + " |")
    up = [arrow for arrow in arrows() if wrong(arrow)]
    print(f"\n{len(up)} imports do not run down")
    for arrow in up:
        print(f"  {arrow.file}:{arrow.line}: {arrow.source} -> {arrow.target}")


if __name__ == "__main__":
    main()
