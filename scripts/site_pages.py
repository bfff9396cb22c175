"""What mkdocs.yml needs beside docs/: the pages of the repository's root, and links that hold.

The pages link to README's neighbours and to the code, as they must on GitHub. On the site README,
CONTRIBUTING and CHANGELOG are pages of docs/, and a link to any other file is its path as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Of the repository's root, and what they are called on the site."""
_LINK = re.compile(r"(!?)\[([^\]\n]*)\]\((?![a-z]+:|#)([^()\s#]+)(#[^()\s]*)?\)")


def site_target(target: str, page: str) -> str | None:
    """A link's target as the site has it, of a page by its path in the repository; None: it is in
    no page."""
    there = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    place = PAGES.get(there) or (there.removeprefix("docs/") if there.startswith("docs/") else None)
    if place == "results":
        place = "results/README.md"
    if place is None:
        return None
    own = PAGES.get(page) or page.removeprefix("docs/")
    return posixpath.relpath(place, posixpath.dirname(own) or ".")


def linked(text: str, page: str) -> str:
    """The text of a page, its links as they are on the site."""

    def new(found: re.Match[str]) -> str:
        mark, words, target, anchor = found.groups()
        place = site_target(target, page)
        if place is not None:
            return f"{mark}[{words}]({place}{anchor or ''})"
        there = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        return f"`{there}`" if words == posixpath.basename(there) else f"{words} (`{there}`)"

    return _LINK.sub(new, text)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: the pages of the root join those of docs/."""
    from mkdocs.structure.files import File

    for name, place in PAGES.items():
        content = linked((ROOT / name).read_text(encoding="utf-8"), name)
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs: a page of docs/, before it becomes HTML."""
    place = page.file.src_uri
    return markdown if place in PAGES.values() else linked(markdown, f"docs/{place}")
