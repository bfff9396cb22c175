"""`python -m tcsae.compare DIR [DIR ...]`: runs and sweeps side by side.

Writes comparison.json, comparison.csv, comparison.md, report.html and notes.txt, and prints the
table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tcsae.errors import USER_ERROR_EXIT_CODE, UserError
from tcsae.files import make_folder, write_json, write_text

if TYPE_CHECKING:
    from tcsae.report.comparison import Comparison

FOLDER = "comparison"


def default_output(folders: Sequence[Path]) -> Path:
    """`comparison/` in the folder that all have in common: the sweep's own, if it is one sweep."""
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    if (common / "config.json").is_file():
        common = common.parent
    return common / FOLDER


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
        help=f"where to write (default: {FOLDER}/ in the folder that all DIRs have in common)",
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
    given = parser.parse_args(arguments)
    for pair in given.baseline:
        if "=" not in pair:
            parser.error(f"--baseline {pair}: it is a KEY=VALUE, as in sae.architecture=topk")
    return given


def _refuse(message: str) -> NoReturn:
    print(f"tcsae: {message}", file=sys.stderr)
    sys.exit(USER_ERROR_EXIT_CODE)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """All five files. Raises UserError where `folder` cannot be written."""
    from tcsae.report.compare_page import write_compare_report
    from tcsae.report.notes import comparison_notes

    make_folder(folder)
    write_json(folder / "comparison.json", comparison.to_json())
    write_text(folder / "comparison.csv", comparison.csv())
    write_text(folder / "comparison.md", comparison.markdown())
    write_text(folder / "notes.txt", comparison_notes(comparison))
    write_compare_report(comparison, folder / "report.html")


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    try:
        from tcsae.report.comparison import compare_runs

        baseline = dict(pair.split("=", 1) for pair in given.baseline)
        comparison = compare_runs(given.folders, baseline)
        output = given.output or default_output(given.folders)
        write_comparison(comparison, output)
    except UserError as error:
        _refuse(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _refuse(f"{error.filename}: {error.strerror}")
    print(comparison.markdown())
    print(f"page: {output / 'report.html'}")


if __name__ == "__main__":
    main()
