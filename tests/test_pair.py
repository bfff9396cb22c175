"""What `make train` does: the pair, on one stream, and a sentence that is true."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import REPOSITORY, run_here, small_job, write_texts

from tcsae.base.run_files import REPORT, RunFiles, runs_below
from tcsae.report.compare_files import FOLDER
from tcsae.report.comparison import compare_runs


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
        # `make test` runs this: an inner make would speak of its folder.
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
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


def test_a_quick_evaluation_has_the_same_numbers_without_intervals(
    tiny_gpt2: Path, own_store: Path, tmp_path: Path
) -> None:
    texts = write_texts(tmp_path / "texts", documents=60)
    found = {}
    for kind in ("default", "quick"):
        job = small_job(
            tiny_gpt2, texts, tmp_path / kind, evaluation=kind, dataset__n_eval_contexts="20"
        )
        drop = ("evaluation.bootstrap=", "evaluation.analysis=", "evaluation.model_contexts=")
        done = run_here(*(word for word in job if not word.startswith(drop)))
        assert done.code == 0, done.stderr
        found[kind] = json.loads(RunFiles(tmp_path / kind).final_info.read_text())
    full, quick = (found[kind]["consistency"] for kind in ("default", "quick"))
    assert "none were asked for" in quick["interval_reason"] and full["interval_reason"] is None
    for name, entry in full["metrics"].items():
        mine = quick["metrics"][name]
        assert mine["energy_weighted"] == pytest.approx(entry["energy_weighted"], nan_ok=True), name
        assert mine["energy_weighted_interval"] == [None, None]
    assert full["metrics"]["C_4"]["energy_weighted_interval"][0] is not None
    assert quick["metrics"]["C_4"]["energy_weighted"] == full["metrics"]["C_4"]["energy_weighted"]
    assert "analyse features" in found["default"]["seconds"]["own"]
    assert "analyse features" not in found["quick"]["seconds"]["own"]
    comparison = compare_runs([tmp_path / "default", tmp_path / "quick"])
    assert "C_4" in comparison.metrics and "n/a" not in comparison.markdown().splitlines()[2]
