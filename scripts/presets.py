"""The dry runs of the presets at real scale, written into docs/slurm.md.

    python scripts/presets.py

Weights, text and GPUs are not needed: a dry run counts what the config says.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pages import block, replace_block

PAGE = Path(__file__).resolve().parent.parent / "docs" / "slurm.md"
PRESETS = ("gemma_16k", "gpt2_small")
_LINE = re.compile(r"^(?:\d\d:\d\d:\d\d INFO +)?(?P<text>.*)$")


def dry_run(preset: str) -> str:
    """The command and what it prints, indented."""
    arguments = [f"+experiment={preset}", "hydra/launcher=slurm", "--dry-run"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tcsae.train", *arguments, f"store.dir={folder}/store"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        said = (done.stdout + done.stderr).replace(f"{folder}/store", "STORE")
        said = said.replace(f"{Path.cwd()}/", "")  # the sweep's folder, from where it is given
    lines = [_LINE.sub(r"\g<text>", line).rstrip() for line in said.splitlines()]
    command = f"$ python -m tcsae.train {' '.join(arguments)}"
    return "\n".join(f"    {line}".rstrip() for line in (command, *lines))


def main() -> None:
    said = "\n\n".join(dry_run(preset) for preset in PRESETS)
    print(said)
    replace_block(PAGE, block("presets", said))


if __name__ == "__main__":
    main()
