"""`python -m tcsae.clean DIR [DIR ...]`: what can go from the disk; asks before anything does."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from tcsae.base.labels import size
from tcsae.cli import agreed, command, refuse, show
from tcsae.runs.leftovers import DAY, Leftover, checkpoints, runs_in, stores, unfinished

SHOWN = 12
"""Lines a kind; the rest is counted."""
OLD = 14.0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.clean",
        description="Free space: says what can go and how much that is, then asks. Results of "
        "finished runs are never touched; activations are harvested anew when they are needed.",
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="DIR", help="checkpoints of the finished runs here"
    )
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="also runs in DIR that failed or were stopped, with their checkpoints: they could "
        "have gone on",
    )
    parser.add_argument(
        "--stores",
        nargs="?",
        type=Path,
        const=Path(os.environ.get("TCSAE_STORE", "~/.cache/tcsae/store")),
        metavar="STORE_DIR",
        help="also activations in store.dir that no run has used for --days",
    )
    parser.add_argument("--days", type=float, default=OLD, help=f"default {OLD:g}")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args(arguments)


def _found(given: argparse.Namespace) -> dict[str, list[Leftover]]:
    found: dict[str, list[Leftover]] = {}
    runs = runs_in(given.folders)
    if given.folders:
        found["checkpoints of finished runs"] = checkpoints(runs)
    if given.unfinished:
        found["unfinished runs"] = unfinished(runs)
    if given.stores is not None:
        found["activations"] = stores(given.stores.expanduser(), given.days * DAY)
    return found


def _say(found: dict[str, list[Leftover]]) -> None:
    for kind, parts in found.items():
        show(f"{kind}: {len(parts)}, {size(sum(part.n_bytes for part in parts))}")
        for part in parts[:SHOWN]:
            show(f"  {size(part.n_bytes):>8}  {part.path}  ({part.said})")
        if len(parts) > SHOWN:
            show(f"  and {len(parts) - SHOWN} more")


def _question(parts: Sequence[Leftover]) -> str:
    return f"remove all of it and free {size(sum(part.n_bytes for part in parts))}?"


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    if not given.folders and (given.unfinished or given.stores is None):
        refuse("give a sweep or run folder, or --stores: python -m tcsae.clean multirun/...")
    if not given.days >= 0:
        refuse(f"--days {given.days:g}: must be 0 or more")
    with command():
        found = _found(given)
        _say(found)
        parts = [part for kind in found.values() for part in kind]
        if not parts:
            show("nothing to remove")
        elif agreed(_question(parts), given.yes):
            freed = 0
            for part in parts:
                if part.remove():
                    freed += part.n_bytes
                else:
                    show(f"left: {part.path}: somebody works there")
            show(f"freed {size(freed)}")


if __name__ == "__main__":
    main()
