"""`python -m tcsae.compare DIR [DIR ...]`: runs and sweeps side by side.

Writes comparison.json, comparison.csv, comparison.md, report.html and notes.txt, and prints the
table. With --index it writes index.html over one folder instead: all its runs and comparisons.
From Python, `tcsae.compare(a, b)` lays the same side by side and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tcsae.cli import command, show

if TYPE_CHECKING:
    from tcsae.report.comparison import Comparison
    from tcsae.runs.folder import LoadedRun


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.compare",
        description="Lay runs and sweeps side by side: tables, a page, notes.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run or a sweep")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: comparison/ in the folder that all DIRs have in common)",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="compare everything with the runs without temporal loss that have this setting, e.g. "
        "sae.architecture=matryoshka (default: each with the runs that differ from it in the "
        "temporal loss alone); may be given several times",
    )
    parser.add_argument(
        "--index",
        action="store_true",
        help="instead: index.html in DIR, a table of all runs and comparisons below it with links",
    )
    given = parser.parse_args(arguments)
    if given.index and (len(given.folders) > 1 or given.output or given.baseline):
        parser.error("--index takes one DIR, and neither --output nor --baseline")
    for pair in given.baseline:
        if "=" not in pair:
            parser.error(f"--baseline {pair}: it is a KEY=VALUE, as in sae.architecture=topk")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    if given.index:
        from tcsae.report.index_page import write_index

        with command():
            index = write_index(given.folders[0])
        show(f"index: {index}")
        return
    # After the arguments: torch takes seconds, --help must not.
    from tcsae.report.compare_files import default_output, write_comparison
    from tcsae.report.comparison import compare_runs

    with command():
        baseline = dict(pair.split("=", 1) for pair in given.baseline)
        comparison = compare_runs(given.folders, baseline)
        output = given.output or default_output(given.folders)
        page = write_comparison(comparison, output)
    show(comparison.markdown())
    show(f"page: {page}")


def compare(*runs: LoadedRun | str | Path, baseline: dict[str, str] | None = None) -> Comparison:
    """Runs side by side: `.markdown()`, `.table()`, `.csv()`, `.to_json()`.

    Args:
        runs: loaded, or folders of runs or sweeps.
        baseline: KEY: VALUE, as --baseline of `python -m tcsae.compare`.

    Raises:
        UserError: a folder without runs, or none that has finished.
    """
    from tcsae.report.comparison import compare_runs

    folders = [run if isinstance(run, str | Path) else run.folder for run in runs]
    return compare_runs(folders, baseline)


class _Callable(ModuleType):
    """`tcsae.compare` is this module, which `python -m tcsae.compare` runs, and is called too."""

    def __call__(
        self, *runs: LoadedRun | str | Path, baseline: dict[str, str] | None = None
    ) -> Comparison:
        return compare(*runs, baseline=baseline)


sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    main()
