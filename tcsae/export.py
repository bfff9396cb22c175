"""`python -m tcsae.export RUN --output FOLDER | --hub NAME`: share a finished run's SAE.

`--for delphi` writes its activations for automatic interpretation instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tcsae.cli import command, show


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.export",
        description="Share a finished run's SAE: SAELens' format, measurements, model card.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--output", type=Path, metavar="FOLDER", help="new, empty, or an earlier export"
    )
    where.add_argument("--hub", metavar="NAME", help="repository, user/name, on the hub")
    parser.add_argument(
        "--for",
        dest="tool",
        choices=("delphi",),
        help="with --output: this tool's own files, the activations on held-out text, in place "
        "of the SAE (SAEDashboard and Neuronpedia take the SAE)",
    )
    parser.add_argument("--private", action="store_true", help="with --hub: create it private")
    given = parser.parse_args(arguments)
    if given.private and given.hub is None:
        parser.error("--private goes with --hub")
    if given.tool and given.output is None:
        parser.error("--for goes with --output")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    # After the arguments: torch takes seconds, --help must not.
    from tcsae.jobs.delphi import export_for_delphi
    from tcsae.jobs.export import export_run, upload_run

    with command():
        if given.tool:
            show(f"exported: {export_for_delphi(given.run, given.output)}")
        elif given.hub is not None:
            show(f"uploaded: {upload_run(given.run, given.hub, given.private)}")
        else:
            show(f"exported: {export_run(given.run, given.output)}")


if __name__ == "__main__":
    main()
