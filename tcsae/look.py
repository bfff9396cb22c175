"""`python -m tcsae.look RUN "text"`: features of a text as strips, on a page that opens offline.

Prints the strongest features and the path of the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tcsae.cli import command, show


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text}: numbers with commas between them, as 3,17"
        ) from None


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: a number of features, 1 or more")
    return int(text)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.look",
        description="The features of a text, token by token: the strongest, and a page of strips.",
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="a run, a folder of runs (the latest is taken), or an SAE of SAELens",
    )
    parser.add_argument("text", metavar="TEXT", help="the text; or a file; or - for stdin")
    parser.add_argument(
        "--features", type=_numbers, default=[], metavar="J,K", help="these and no others"
    )
    parser.add_argument(
        "--top",
        type=_positive,
        default=12,
        metavar="N",
        help="the N strongest, by the sum over the text (default: 12)",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="lay each feature beside its counterpart in this run",
    )
    parser.add_argument(
        "--parts",
        action="store_true",
        help="read a text that is longer than a context in parts, as training text is",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: look/ in the run's folder)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    # After the arguments: torch takes seconds, --help must not.
    from tcsae.jobs.looking import look, read_text

    with command():
        found = look(
            given.run,
            read_text(given.text),
            features=given.features,
            top=given.top,
            baseline=given.baseline,
            parted=given.parts,
        )
        page = found.write(given.output)
    for line in found.lines():
        show(line)
    show(f"page: {page}")


if __name__ == "__main__":
    main()
