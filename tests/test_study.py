"""docs/results says what its JSON files hold, and no number in it is typed by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import study
import study_figures
import study_text

pytestmark = pytest.mark.documents

RESULTS = json.loads(study.RESULTS.read_text(encoding="utf-8"))
RUNS = [json.loads(line) for line in study.RUNS.read_text(encoding="utf-8").splitlines()]
SETTINGS = {"0.05", "0.1", "0.15", "0.2", "0.3", "0.04", ".02", ".01"}
"""Decimals that the page may name without looking them up: weights of losses, and the protocol's
criteria."""


def test_the_page_is_what_its_template_and_results_make() -> None:
    assert study.PAGE.read_text(encoding="utf-8") == study.rendered(study.TEMPLATE, RESULTS, RUNS)
    assert study.TABLES.read_text(encoding="utf-8") == study.tables(RESULTS)


def test_no_result_is_typed_into_the_page() -> None:
    text = study.TEMPLATE.read_text(encoding="utf-8")
    prose = re.sub(r"{{.*?}}|{%.*?%}|\]\([^)]*\)|`[^`]*`", "", text, flags=re.DOTALL)
    typed = set(re.findall(r"(?<![\w.])\d*\.\d+(?!\w|\.\d)", prose))
    assert typed <= SETTINGS, typed - SETTINGS


def test_every_figure_is_what_the_results_make(tmp_path: Path) -> None:
    study_figures.write_figures(RESULTS, tmp_path)
    for name in study_figures.FIGURES:
        drawn = (tmp_path / name).read_text(encoding="utf-8")
        assert drawn == (study.DOCS / name).read_text(encoding="utf-8"), name


def test_every_value_of_the_results_is_the_mean_of_its_runs() -> None:
    """Energy-weighted C_8 and explained variance, from the line of each run."""
    for table, found in RESULTS.items():
        runs = [run for run in RUNS if run["table"] == table]
        for row in found["rows"].values():
            for metric, of_run in (
                ("C_8", lambda info: info["consistency"]["C_8"]["energy_weighted"]),
                ("l0", lambda info: info["metrics"]["sparsity"]["l0"]),
            ):
                wanted = row["metrics"][metric]["value"]
                by_seed: dict[int, list[float]] = {}
                for run in runs:
                    by_seed.setdefault(run["config"]["seed"], []).append(of_run(run["info"]))
                if table.endswith("persistent") and row["is_baseline"]:
                    continue  # the runs of topk, checked there
                # Some choice of one run for each seed has this mean: each lies within the range.
                low = sum(min(by_seed[s]) for s in row["seeds"]) / len(row["seeds"])
                high = sum(max(by_seed[s]) for s in row["seeds"]) / len(row["seeds"])
                assert low - 1e-9 <= wanted <= high + 1e-9, (table, row["name"], metric)


def test_every_run_trained_on_a_million_tokens() -> None:
    assert RUNS
    for run in RUNS:
        info, sae = run["info"], run["config"]["sae"]
        assert info["training_steps"] == 512 and info["tokens"] > 1_000_000
        if "k" in sae and sae["architecture"] != "persistent":
            assert info["metrics"]["sparsity"]["l0"] == pytest.approx(sae["k"], rel=0.1)
        if target := run["config"]["training"]["target_l0"]:
            assert info["metrics"]["sparsity"]["l0"] == pytest.approx(target, rel=0.2)


def test_every_arm_is_compared_at_its_own_sparsity() -> None:
    """The persistent SAE with k 32 alone has an L0 at which nothing else was trained."""
    for table, found in RESULTS.items():
        for key, row in found["rows"].items():
            if not row["is_baseline"] and key != "persistent-32":
                assert row["deltas"]["C_8"]["value"] is not None, (table, key)


def test_the_protocol_is_older_than_the_results() -> None:
    def first_commit(path: str) -> int:
        command = ["git", "log", "--diff-filter=A", "--format=%ct", "--", path]
        times = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.split()
        return int(times[-1])

    assert first_commit("docs/results/protocol.md") < first_commit("docs/results/results.json")


def test_brown_text_is_prose_again() -> None:
    tagged = "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` No/rb evidence/nn ''/'' (/( ok/uh )/) ./.\n"
    assert study_text.brown_text(tagged) == 'The jury said, "No evidence" (ok).\n'


def test_tags_of_the_brown_corpus_lie_on_their_words() -> None:
    tagged = "The/at jury/nn said/vbd ,/, ``/`` No/at evidence/nn-hl ''/'' (/( ok/uh )/) ./."
    text, spans = study_text.brown_tagged(tagged + "\n\nIt's/pps+bez 5/cd :/:")
    assert text == 'The jury said, "No evidence" (ok).\n\nIt\'s 5:\n'
    assert [(text[start:end], tag) for start, end, tag in spans] == [
        ("The", "DET"),
        ("jury", "NOUN"),
        ("said", "VERB"),
        ("No", "DET"),
        ("evidence", "NOUN"),
        ("ok", "X"),
        ("It's", "PRON"),
        ("5", "NUM"),
    ]
