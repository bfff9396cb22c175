"""A tag's notes, and that the version stands in one place alone."""

from __future__ import annotations

import subprocess
import sys

import yaml
from helpers import REPOSITORY

from tcsae import __version__


def said(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/tag_notes.py", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )


def test_the_notes_of_a_tag_are_the_section_of_its_version() -> None:
    found = said()
    assert found.returncode == 0, found.stderr
    first, blank, *rest = found.stdout.splitlines()
    assert (first, blank) == (f"tcsae {__version__}", "") and rest[0].startswith("- ")
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "\n".join(rest) in changes and not any(line.startswith("## ") for line in rest)


def test_a_version_without_a_section_is_one_line() -> None:
    found = said("9.9.9")
    assert found.returncode == 1
    assert found.stderr.strip() == "CHANGELOG.md has no section 9.9.9: it begins with `## 9.9.9`"


def test_what_is_cited_is_the_version() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
