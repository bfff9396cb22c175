"""`python -m tcsae.look`: a text through one run, or two, as a page of strips."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.base.files import make_folder
from tcsae.base.labels import number
from tcsae.jobs.opening import OpenedSAE, open_
from tcsae.measure.text_features import TextFeatures, check_feature
from tcsae.report.look_page import Seen, counterpart, write_look_page
from tcsae.runs.folder import LoadedRun

LONGEST = 1 << 20
"""Bytes of a text that is read."""
FOLDER = "look"
"""Of the pages, in a run's folder."""


@dataclass(frozen=True)
class Look:
    """What was read, and which features of it are shown."""

    seen: Seen
    features: list[int]
    baseline: Seen | None
    page: Path
    """Where it goes if nobody says where."""

    def lines(self) -> list[str]:
        """A row a feature, for the terminal."""
        names, beside = self.seen.name, ""
        if self.baseline is not None:
            names += f", beside {self.baseline.name}"
            beside = f" {'baseline':>9} {'cosine':>7}"
        head = f"{'feature':>8} {'on':>5} {'in a row':>9} {'peak':>9}{beside}"
        lines = [f"{len(self.seen.found)} tokens; {names}", f"{head}  what sets it apart"]
        for feature in self.features:
            strip = self.seen.found.strip(feature)
            line = f"{feature:>8} {strip.n_on:>5} {strip.longest:>9} {number(strip.largest):>9}"
            if self.baseline is not None:
                other, cosine = counterpart(feature, self.seen.W_dec, self.baseline.W_dec)
                line += f" {other:>9} {number(cosine):>7}"
            lines.append(f"{line}  {' '.join(self.seen.tokens(feature))}".rstrip())
        return lines

    def write(self, path: Path | None = None) -> Path:
        """The page, in the run's folder unless `path` says where.

        Raises UserError where it cannot be written.
        """
        path = path or self.page
        make_folder(path.parent)
        return write_look_page(path, self.seen, self.features, self.baseline)


def read_text(given: str) -> str:
    """The text: of a file if there is one of this name, of stdin for "-", else `given` itself.

    Raises UserError for what is no text, is empty, or is longer than LONGEST.
    """
    if given == "-":
        source, data = "stdin", sys.stdin.buffer.read(LONGEST + 1)
    elif _is_file(given):
        source = given
        with Path(given).open("rb") as file:
            data = file.read(LONGEST + 1)
    else:
        source, data = "the text", given.encode("utf-8", "replace")
    if len(data) > LONGEST:
        raise UserError(f"{source} is longer than {LONGEST:,} bytes: give a part of it")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text ({error.reason} at {error.start})") from None
    if not text.strip():
        raise UserError(f"{source} is empty: give some words")
    return text


def _is_file(given: str) -> bool:
    try:
        return Path(given).is_file()
    except (OSError, ValueError):  # longer than a name may be, or with a NUL in it
        return False


def look(
    folder: Path,
    text: str,
    *,
    features: Sequence[int] = (),
    top: int = 12,
    baseline: Path | None = None,
    parted: bool = False,
) -> Look:
    """Read `text` with the run in `folder` and, beside it, with `baseline`.

    Args:
        folder, baseline: as `tcsae.open` takes them.
        features: to show; none: the `top` strongest in the text.
        parted: as `TextReader.read`.

    Raises:
        UserError: as `tcsae.open` and `TextReader.read`, a feature that is not there, a baseline
            that reads another model or hook.
    """
    opened = open_(folder)
    other = None if baseline is None else open_(baseline)
    for feature in features:
        check_feature(feature, opened.sae.d_sae)
    if other is not None and opened.reader.model.identity != other.reader.model.identity:
        raise UserError(
            f"{baseline} reads another model, hook or precision than {folder}: their features of "
            "one text have no common tokens to lie side by side on"
        )
    found = opened.features(text, parted=parted)
    chosen = list(dict.fromkeys(features)) or [f.feature for f in found.top(top)]
    seen = seen_of(opened, found)
    if other is None:
        return Look(seen, chosen, None, _page(opened, text))
    beside = seen_of(other, other.features(text, parted=parted))
    if len(beside.found) != len(found):
        raise UserError(
            f"{baseline} has contexts of {other.config.dataset.context_size} tokens and {folder} "
            f"of {opened.config.dataset.context_size}: give a text that fits into both"
        )
    return Look(seen, chosen, beside, _page(opened, text))


def seen_of(opened: LoadedRun | OpenedSAE, found: TextFeatures) -> Seen:
    run = opened if isinstance(opened, LoadedRun) else None
    return Seen(
        name=opened.folder.resolve().name,
        words="; ".join(line.strip() for line in repr(opened).splitlines()[1:-1]),
        found=found,
        W_dec=opened.sae.W_dec.detach().cpu(),
        per_feature=run.per_feature if run else {},
        analysis=run.analysis if run else None,
    )


def _page(opened: LoadedRun | OpenedSAE, text: str) -> Path:
    """look/<first words of the text> in the run's folder; of an SAE alone, in this one."""
    root = opened.folder if isinstance(opened, LoadedRun) else Path()
    words = re.sub(r"[^a-z0-9]+", "-", text[:60].lower()).strip("-")[:32].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:6]
    return root / FOLDER / f"{words or 'text'}-{digest}.html"
