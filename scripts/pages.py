"""What the scripts that write pages of docs/ from run folders share."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def given_folders(description: str | None) -> list[Path]:
    """The command line's run folders; none: write the page from its JSON alone."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("folders", nargs="*", type=Path, metavar="DIR")
    folders: list[Path] = arguments.parse_args().folders
    return folders


def with_interval(
    entry: Mapping[str, Any], digits: int = 3, signed: bool = False, key: str = "value"
) -> str:
    """`+0.012 [+0.010, +0.014]`, without the interval where there is none."""
    form = f"{'+' if signed else ''}.{digits}f"
    text = format(entry[key], form)
    if entry["low"] is not None:
        text += f" [{entry['low']:{form}}, {entry['high']:{form}}]"
    return text


def block(name: str, content: str) -> str:
    """`content` between the marks of the block `name` of a page."""
    return f"<!-- {name}: begin -->\n{content}\n<!-- {name}: end -->"


def replace_block(page: Path, new: str) -> None:
    """Put `new`, of `block`, in the place of the page's own block of that name.

    Raises ValueError where the page has none, or several.
    """
    begin, *_, end = new.splitlines()
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{new}{after}", encoding="utf-8")


def publish(
    description: str | None,
    results: Callable[[Sequence[Path]], Any],
    text: Callable[[Any], str],
    record: Path,
    name: str,
    pages: Sequence[Path],
) -> None:
    """The command of a script that writes one block: `results` of the command line's folders into
    `record` or, without folders, what that has; `text` of it into the block `name` of `pages`."""
    folders = given_folders(description)
    found = results(folders) if folders else json.loads(record.read_text(encoding="utf-8"))
    if folders:
        record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    said = text(found)
    for page in pages:
        replace_block(page, block(name, said))
    print(said)


def cpuinfo() -> dict[str, str]:
    """What Linux says of the processor; {} elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}


def processor() -> str:
    """Its name and, where it is known, its family."""
    named = cpuinfo()
    if not named:
        return platform.processor() or platform.machine()
    return f"{named.get('model name', platform.machine())} (family {named.get('cpu family', '?')})"
