"""`python -m tcsae.meaning RUN|SWEEP ...`: what the features of finished runs mean.

Measures with the instruments that are chosen, writes each run's eval/meaning.json and its pages
again, and prints the headline numbers. Runs of one text are measured together.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcsae.base.log import tcsae_console
from tcsae.base.signals import stop_on_signal
from tcsae.cli import command, show


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.meaning",
        description="What the features of finished runs mean, by the instruments of docs/meaning.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="runs, sweeps, or folders of them; an SAE from elsewhere becomes a run by "
        "python -m tcsae.evaluate",
    )
    parser.add_argument(
        "--instruments",
        type=_names,
        default=["probes"],
        metavar="A,B",
        help="which ones (default: probes)",
    )
    parser.add_argument(
        "--labels",
        type=_names,
        metavar="FIELD,FIELD",
        help="fields of the text's rows that probes learn (default: the run's "
        "evaluation.label_fields)",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    return parser.parse_args(arguments)


def _lines(folder: str, found: dict[str, Any]) -> list[str]:
    lines = [folder]
    for part in found.values():
        for name, number in part["headline"].items():
            low, high = number["interval"]
            value = "n/a" if number["value"] is None else f"{number['value']:.3f}"
            band = "" if low is None else f"  [{low:.3f}, {high:.3f}]"
            lines.append(f"  {name:<32} {value}{band}")
        lines += [f"  {sentence}" for sentence in part["said"]]
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    # After the arguments: torch takes seconds, --help must not.
    from tcsae.jobs.meaning import measure_finished

    with command(), tcsae_console(), stop_on_signal() as stop:
        settings = {} if given.labels is None else {"label_fields": given.labels}
        found = measure_finished(given.runs, given.instruments, settings, stop)
    if given.json:
        show(json.dumps(found, indent=1))
        return
    for folder, parts in found.items():
        for line in _lines(folder, parts):
            show(line)


if __name__ == "__main__":
    main()
