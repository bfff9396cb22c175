"""The end of a sweep: its comparison page, also when jobs failed; and the same in W&B."""

from __future__ import annotations

import logging
from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.base.run_files import RunFiles, runs_below
from tcsae.config import TrackingConfig, parse

log = logging.getLogger(__name__)


def write_sweep_page(sweep: Path) -> Path | None:
    """The comparison of a sweep's finished jobs; None, with a warning, if it cannot be made."""
    from tcsae.jobs.tracking import send_comparison
    from tcsae.report.compare_files import FOLDER, write_comparison
    from tcsae.report.comparison import compare_runs

    folder = sweep / FOLDER
    try:
        comparison = compare_runs([sweep])
        page = write_comparison(comparison, folder)
        tracking = _tracking(sweep)
    except UserError as error:
        log.warning(f"no comparison page: {error}")
        return None
    for line in comparison.answers:
        log.info(line)
    log.info(f"the comparison: {page}")
    if tracking.group is not None:
        send_comparison(comparison, folder, tracking, tracking.group)
    return folder


def _tracking(sweep: Path) -> TrackingConfig:
    """As the sweep's jobs have it; they differ in nothing that matters here."""
    configs = (RunFiles(run).config for run in runs_below(sweep))
    return parse(read_json(next(config for config in configs if config.is_file()))).tracking
