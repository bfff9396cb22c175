"""`python -m tcsae.evaluate FOLDER [key=value ...]`: measure an SAE from anywhere as a run's is.

FOLDER is SAELens', dictionary_learning's, sparsify's or Gemma Scope's (or a file in it), an export
or a run; `--release` and `--sae-id` name one of SAELens' pretrained SAEs. What it is measured on is
what the folder says of itself (model, hook, size of contexts; an export or a run: everything),
unless a key says otherwise. The result is a run folder like that of a trained run, for
`python -m tcsae.compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tcsae.base.log import tcsae_console
from tcsae.base.signals import stop_on_signal
from tcsae.cli import command, show


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.evaluate",
        description="Measure an SAE from anywhere on held-out text, as a run's SAE is measured.",
        epilog="Keys as of python -m tcsae.train: model, layer, window, dataset, evaluation, "
        "store. Those that are not given are what the SAE says of itself, else the defaults.",
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="[FOLDER] key=value",
        help="a folder of SAELens, dictionary_learning, sparsify or Gemma Scope, a file in it, an "
        "export or a run; then what to measure it on",
    )
    parser.add_argument("--release", help="of SAELens' pretrained SAEs, in place of FOLDER")
    parser.add_argument("--sae-id", metavar="ID", help="with --release")
    parser.add_argument(
        "--output", type=Path, metavar="RUN", help="the run folder (default: in outputs/)"
    )
    given = parser.parse_intermixed_args(arguments)
    if (given.release is None) != (given.sae_id is None):
        parser.error("--release and --sae-id go together")
    given.folder = None
    if given.release is None:
        if not given.arguments:
            parser.error("give FOLDER, or --release and --sae-id")
        given.folder, *given.arguments = given.arguments
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    # After the arguments: torch takes seconds, --help must not.
    from tcsae.jobs.foreign import from_folder, from_release
    from tcsae.jobs.measure_foreign import evaluate_sae

    with command(), tcsae_console(), stop_on_signal() as stop:
        if given.folder is None:
            found = from_release(given.release, given.sae_id)
        else:
            found = from_folder(Path(given.folder))
        folder = evaluate_sae(found, given.arguments, given.output, stop)
    show(f"measured: {folder}")


if __name__ == "__main__":
    main()
