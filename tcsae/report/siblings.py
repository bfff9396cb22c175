"""From a run's page to the sweep that it is of: its comparison, and the other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.base.run_files import REPORT, SWEEP_FILE
from tcsae.report.compare_files import FOLDER

MOST = 24
"""Links; of larger sweeps those next to the run by number, and how many there are."""


def siblings(folder: Path) -> dict[str, Any] | None:
    """What the page in a run's `folder` links to; None for a run of no sweep.

    The others' pages may not be there yet: each is written when its run has finished, and the
    comparison when the last has.
    """
    folder = folder.resolve()
    sweep = next((p for p in folder.parents if (p / SWEEP_FILE).is_file()), None)
    if sweep is None:
        return None
    own = folder.relative_to(sweep).as_posix()
    up = "../" * len(Path(own).parts)
    try:
        jobs = read_json(sweep / SWEEP_FILE)["jobs"]
        found = [(str(job["folder"]), str(job["name"])) for job in jobs]
    except (UserError, LookupError, TypeError):
        return None
    here = next((i for i, (where, _) in enumerate(found) if where == own), None)
    if here is None:
        return None
    first = max(0, min(here - MOST // 2, len(found) - MOST))
    return {
        "sweep": sweep.name,
        "name": found[here][1],
        "n": len(found),
        "comparison": f"{up}{FOLDER}/{REPORT}",
        "others": [
            {"name": name, "href": f"{up}{quote(where)}/{REPORT}"}
            for where, name in found[first : first + MOST]
            if where != own
        ],
    }
