"""`python -m tcsae.dashboard --entity E [--group SWEEP]`: a W&B workspace made from code.

`--dry-run` prints what it would show and `--json FILE` writes its definition; neither needs an
account or the network.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tcsae.base.errors import UserError
from tcsae.base.files import make_folder, write_json
from tcsae.cli import command, show
from tcsae.report.workspace import DEFAULT_WINDOW, definition, outline, workspace

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def _save(made: Workspace) -> str:
    """Its address. Raises UserError if W&B does not take it."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        # Asked first: at a terminal, W&B would prompt for a key.
        if not wandb.login(prompt=False, verify=False):
            raise wandb.errors.UsageError("no API key is known")
        made.save()
        return made.url
    except Exception as error:
        said = " ".join(f"{error}".split())
        raise UserError(
            f"W&B did not take the workspace for {made.entity}/{made.project} ({said}): run `wandb "
            "login`, check --entity and --project, or write it to a file with --json FILE"
        ) from error


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.dashboard",
        description="Make a W&B workspace that shows runs and sweeps.",
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="tcsae", help="W&B project (default: tcsae)")
    parser.add_argument("--group", metavar="SWEEP", help="only this sweep's runs")
    parser.add_argument(
        "--window",
        type=int,
        default=DEFAULT_WINDOW,
        metavar="W",
        help=f"show C_W and L_W for this W, one of evaluation.windows (default: {DEFAULT_WINDOW})",
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--json", type=Path, metavar="FILE", help="write the definition; no network")
    alone.add_argument("--dry-run", action="store_true", help="print what it shows; no network")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    with command():
        made = workspace(given.entity, given.project, given.group, given.window)
        if given.dry_run:
            show(outline(made))
        elif given.json is not None:
            make_folder(given.json.parent)
            write_json(given.json, definition(made))
            show(f"definition: {given.json}")
        else:
            show(f"workspace: {_save(made)}")


if __name__ == "__main__":
    main()
