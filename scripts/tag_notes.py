"""The section of CHANGELOG.md that a tag's notes are: `python scripts/tag_notes.py [VERSION]`.

python scripts/tag_notes.py > build/notes.md && git tag -a v0.1.0 -F build/notes.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tcsae import __version__

CHANGES = Path(__file__).parent.parent / "CHANGELOG.md"


def notes(changes: str, version: str) -> str:
    """The section of `version`, under a line that names it. ValueError: there is none."""
    for section in re.split(r"^## ", changes, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        if title.split()[:1] == [version]:
            return f"tcsae {version}\n\n{body.strip()}\n"
    raise ValueError(f"CHANGELOG.md has no section {version}: it begins with `## {version}`")


def main(arguments: list[str]) -> None:
    try:
        print(notes(CHANGES.read_text(encoding="utf-8"), [*arguments, __version__][0]), end="")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
