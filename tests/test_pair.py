"""What `make train` does: the pair, on one stream, and a sentence that is true."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from helpers import REPOSITORY, run_here, small_job, write_texts

from tcsae.base.run_files import REPORT, RunFiles, runs_below
from tcsae.report.compare_files import FOLDER


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ("", "+experiment=pair"),
        ("window=16 lambda=0.2", "+experiment=pair window=16 lambda=0.2"),
        ("+experiment=grid --dry-run", "+experiment=grid --dry-run"),
        ("--multirun seed=0,1", "--multirun seed=0,1"),
    ],
)
def test_make_train_trains_the_pair_unless_something_else_is_named(
    given: str, command: str
) -> None:
    made = subprocess.run(
        ["make", "-n", "-o", ".venv/.train", "train", f"ARGS={given}"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert made.stdout.split() == [".venv/bin/python", "-m", "tcsae.train", *command.split()]


def test_the_pair_ends_with_a_sentence_of_its_own_numbers(
    tiny_gpt2: Path, own_store: Path, tmp_path: Path
) -> None:
    texts = write_texts(tmp_path / "texts", documents=60)
    job = small_job(
        tiny_gpt2,
        texts,
        tmp_path / "unused",
        dataset__n_eval_contexts="20",
        evaluation__windows="[2,4]",
    )
    sweep = tmp_path / "pair"
    done = run_here("+experiment=pair", *job, "lambda=0.5", f"hydra.sweep.dir={sweep}")
    assert done.code == 0, done.stderr
    infos = {}
    for folder in runs_below(sweep):
        files = RunFiles(folder)
        form = json.loads(files.config.read_text())["consistency"]["form"]
        infos[form] = json.loads(files.final_info.read_text())
    assert set(infos) == {"none", "scale_free"}
    said = [
        line for line in done.stderr.splitlines() if "against the same without the loss" in line
    ]
    assert len(said) == 1
    for name, value in (
        ("C_4", lambda info: info["consistency"]["metrics"]["C_4"]["energy_weighted"]),
        (
            "Explained variance",
            lambda i: i["metrics"]["reconstruction_quality"]["explained_variance"],
        ),
    ):
        found = re.search(rf"{name}\S* (-?[\d.]+) -> (-?[\d.]+) \(", said[0])
        assert found is not None, said
        before, after = (value(infos[form]) for form in ("none", "scale_free"))
        assert float(found[1]) == pytest.approx(before, abs=6e-4)
        assert float(found[2]) == pytest.approx(after, abs=6e-4)
    page = (sweep / FOLDER / REPORT).read_text()
    assert "In a sentence" in page and "against the same without the loss" in page
