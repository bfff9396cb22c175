"""`python -m tcsae.serve RUN [RUN ...]`: a local page: text in, features out, steering.

One to three SAEs of one model and hook lie side by side. Only this machine can reach the page, and
only with the token in its address.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tcsae.base.printable import printable
from tcsae.cli import command


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text}: a port is a number from 0 to 65535")
    return int(text)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.serve",
        description="A page on this machine: paste a text, see features as strips, steer.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="one to three runs, or a folder with as many; SAEs of SAELens too",
    )
    parser.add_argument(
        "--port", type=_port, default=0, help="of 127.0.0.1 (default: one that is free)"
    )
    return parser.parse_args(arguments)


def _tell(line: str) -> None:
    print(printable(line), flush=True)  # at once, to a file or a pipe too


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    # After the arguments: torch takes seconds, --help must not.
    from tcsae.live.server import serve

    with command():
        serve(given.runs, given.port, _tell)


if __name__ == "__main__":
    main()
