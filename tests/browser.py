"""A page in headless Chromium, where there is one; else what its HTML alone says."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from tcsae.base.run_files import RunFiles
from tcsae.report.run_page import write_run_page
from tcsae.runs.folder import load_run

EVIL = "</script><img src=x onerror=alert(1)><b>"
"""Text that a page must show as it is."""

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HEADLESS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_FLAGS = (
    *HEADLESS,
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=20000",
    "--dump-dom",
)


def page_of(folder: Path) -> Path:
    """The page of the run in `folder`, written there."""
    return write_run_page(load_run(folder), RunFiles(folder).report)


@dataclass
class Tags(HTMLParser):
    """Elements with their attributes, and the text of those that matter."""

    html: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@dataclass(frozen=True)
class Shown:
    """What a browser made of a page."""

    html: str
    messages: list[str]
    """Of the console: warnings, errors and uncaught exceptions."""

    @property
    def tags(self) -> Tags:
        return Tags(self.html)


def show(page: Path, fragment: str = "") -> Shown | None:
    """The page after its script ran; None, with a warning, where there is no Chromium."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        warnings.warn("no Chromium on PATH: the page's script was not run", stacklevel=2)
        return None
    with tempfile.TemporaryDirectory() as profile:
        command = [binary, *_FLAGS, f"--user-data-dir={profile}", f"file://{page}{fragment}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return Shown(done.stdout, re.findall(r"CONSOLE.*", done.stderr))
