"""`python -m tcsae.steer RUN --feature J "prompt"`: how the model goes on with a feature set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tcsae.cli import command, show


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.steer",
        description="Continue a prompt as the model does, and with one feature set at every token.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run, or a folder of runs (the latest is taken)"
    )
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--feature", type=int, required=True, metavar="J")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--strength",
        type=float,
        default=2.0,
        metavar="S",
        help="in units of the feature's mean where it is on (default: 2; 0 switches it off)",
    )
    how.add_argument("--value", type=float, metavar="V", help="on the scale of its activations")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="to add (default: 40)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): the likeliest token each time"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, for both")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    # After the arguments: torch takes seconds, --help must not.
    from tcsae.jobs.opening import open_

    with command():
        found = open_(given.run).steer(
            given.prompt,
            given.feature,
            given.strength,
            value=given.value,
            tokens=given.tokens,
            temperature=given.temperature,
            seed=given.seed,
        )
        show(repr(found))


if __name__ == "__main__":
    main()
