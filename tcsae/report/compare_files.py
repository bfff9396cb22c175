"""The files of a comparison: for a table, a program, a reader, and the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tcsae.base.files import make_folder, save_tensors, write_json, write_text
from tcsae.base.run_files import NOTES, REPORT, STABILITY, RunFiles
from tcsae.report.compare_page import write_compare_report
from tcsae.report.comparison import Comparison
from tcsae.report.notes import comparison_notes

FOLDER = "comparison"


def default_output(folders: Sequence[Path]) -> Path:
    """`comparison/` in the folder that all have in common: the sweep's own, if it is one sweep."""
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    if RunFiles(common).is_begun:
        common = common.parent
    return common / FOLDER


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """All files; the path of the page. Raises UserError where `folder` cannot be written."""
    make_folder(folder)
    write_json(folder / "comparison.json", comparison.to_json())
    write_text(folder / "comparison.csv", comparison.csv())
    write_text(folder / "comparison.md", comparison.markdown())
    write_text(folder / NOTES, comparison_notes(comparison))
    if comparison.stable:
        save_tensors(folder / STABILITY, comparison.stable, {})
    else:
        (folder / STABILITY).unlink(missing_ok=True)
    return write_compare_report(comparison, folder / REPORT)
