"""Notes say what the numbers say, and no more."""

from __future__ import annotations

import dataclasses
import html
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import WORDS, run_here, small_job

from tcsae.base.labels import interval_text, number
from tcsae.base.run_files import NOTES, RunFiles
from tcsae.jobs.finish import write_pages
from tcsae.report.contents import Contents
from tcsae.report.notes import density_verdict, run_notes, verdicts, write_run_notes
from tcsae.report.origin import misleading
from tcsae.runs.folder import LoadedRun, load_run


@pytest.fixture(scope="module")
def run(run_folder: Path) -> LoadedRun:
    return load_run(run_folder)


@pytest.fixture(scope="module")
def notes(run: LoadedRun) -> str:
    return run_notes(run)


def test_every_core_metric_is_there_with_its_interval(run: LoadedRun, notes: str) -> None:
    intervals = run.core["eval_result_unstructured"]["intervals"]
    line = next(line for line in notes.splitlines() if line.startswith("Explained variance "))
    value = run.core["eval_result_metrics"]["reconstruction_quality"]["explained_variance"]
    assert number(value) in line
    assert interval_text(intervals["explained_variance"]) in line


def test_every_consistency_metric_is_there_with_its_interval(run: LoadedRun, notes: str) -> None:
    for name, said in (("C_4", "Window consistency C_4"), ("omega_squared", "Position share ome")):
        entry = run.consistency["summary"]["metrics"][name]
        line = next(line for line in notes.splitlines() if line.startswith(said))
        assert number(entry["energy_weighted"]) in line
        assert interval_text(entry["energy_weighted_interval"]) in line


def test_settings_command_and_limits_are_there(run: LoadedRun, notes: str) -> None:
    assert "window 4; lambda 0.1" in notes
    assert "python -m tcsae.train" in notes
    assert run.final_info["unique_id"] in notes
    assert "One run, one seed" in notes
    assert "near-copies" in notes and "Clusters of features" in notes
    assert "nan" not in notes.lower().split()


def test_an_l0_that_was_asked_for_and_not_reached_is_said_first(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    """On the log, the notes and the page; one that was reached within a tenth, nowhere."""
    said = {}
    for target in ("1.5", "near"):
        if target == "near":
            l0 = load_run(tmp_path / "1.5").final_info["metrics"]["sparsity"]["l0"]
        folder = tmp_path / target
        asked = 1.5 if target == "1.5" else 1.05 * l0
        changes = {"sae": "standard", "training__target_l0": str(asked), "layer": "1"}
        changes |= {"training__tokens": "2000", "store__dir": str(tmp_path / "store")}
        outcome = run_here(*small_job(tiny_gpt2, texts, folder, **changes))
        assert outcome.code == 0
        files, words = RunFiles(folder), f"training.target_l0 = {asked:g} was asked for"
        texts_ = [file.read_text() for file in (files.log, files.notes, files.report)]
        said[target] = [words in " ".join(text.split()) for text in texts_]
        measured = load_run(folder).final_info["metrics"]["sparsity"]["l0"]
        assert (abs(measured / asked - 1) > 0.1) == (target == "1.5"), measured
    assert said == {"1.5": [True] * 3, "near": [False] * 3}


def test_what_makes_the_text_unfit_is_said(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Documents shorter than the window; copies that a few words keep from being equal."""
    rng = random.Random(0)
    passage = [" ".join(rng.choices(WORDS, k=120)) for _ in range(10)]
    wanted = {
        "good": [" ".join(rng.choices(WORDS, k=120)) for _ in range(100)],
        "short": [" ".join(rng.choices(WORDS, k=120 if n < 4 else 4)) for n in range(3000)],
        "copies": [f"{n} {passage[n % 10]}" for n in range(100)],
    }
    words = {
        "short": "of the training tokens lie where a document has 12 valid tokens in a row",
        "copies": "of the held-out contexts stand in the training text too (half",
    }
    for name, rows in wanted.items():
        text = tmp_path / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        changes = {"window": "12", "lambda": "0.2", "training__tokens": "2000"}
        changes |= {"dataset__n_contexts": "null", "dataset__eval_fraction": "0.3"}
        folder = tmp_path / name
        command = small_job(tiny_gpt2, text, folder, store__dir=str(tmp_path / "store"), **changes)
        assert run_here(*command).code == 0
        files, info = RunFiles(folder), load_run(folder).final_info
        # The end of a page's section where cautions stand, as in the notes.
        said = {
            kind: [
                sentence in " ".join(html.unescape(file.read_text()).split())
                for file in (files.notes, files.report)
            ]
            for kind, sentence in words.items()
        }
        assert said == {kind: [kind == name] * 2 for kind in words}, name
        share = info["tokens_in_windows"]
        assert (share < 0.5) == (name == "short") and 0 < share <= 1
        assert (words["short"] in files.log.read_text()) == (name == "short")
        seen = info["held_out_seen_in_training"]
        assert seen > 0.9 if name == "copies" else seen == 0, (name, seen)
        notes = files.notes.read_text()
        assert f"{100 * share:.2f} % of the training tokens" in notes


@pytest.mark.parametrize(
    ("explained", "score", "alive", "words"),
    [
        (0.9, 0.99, 1.0, []),
        (0.0, 1.0, 0.1, []),
        (-5.0, 0.9, 1.0, ["Explained variance is -5"]),
        (-0.01, -0.2, 1.0, ["Explained variance is -0.01", "worse with the reconstruction"]),
        (0.5, 1.28, 1.0, ["better with the reconstruction"]),
        (None, None, 0.0, ["No feature fired"]),
    ],
)
def test_numbers_that_cannot_be_read_as_usual_come_with_words(
    explained: float | None, score: float | None, alive: float, words: list[str]
) -> None:
    metrics = {
        "reconstruction_quality": {"explained_variance": explained},
        "model_performance_preservation": {"ce_loss_score": score},
        "misc_metrics": {"frac_alive": alive},
    }
    said = misleading(metrics)
    assert len(said) == len(words)
    assert all(word in line for word, line in zip(words, said, strict=True))


def test_an_sae_worse_than_the_mean_says_so_before_any_number(
    run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    files = RunFiles(folder)
    info = json.loads(files.final_info.read_text())
    info["metrics"]["reconstruction_quality"]["explained_variance"] = -5.0
    files.final_info.write_text(json.dumps(info))
    write_pages(load_run(folder))
    page = files.report.read_text()
    assert page.index("Explained variance is -5") < page.index("Results on held-out text")
    assert "- Explained variance is -5" in files.notes.read_text()


def test_explained_variance_by_norm_limit_is_there(run: LoadedRun, notes: str) -> None:
    rows = run.core["eval_result_unstructured"]["explained_variance_by_norm_limit"]
    assert [row["limit"] for row in rows] == [2, 3, 5, 10, None]
    assert run.final_info["explained_variance_by_norm_limit"] == rows
    table = notes.partition("Explained variance by norm limit:\n")[2].splitlines()[1:6]
    for row, line in zip(rows, table, strict=True):
        assert number(row["explained_variance"]) in line
    assert [line.partition("  ")[0] for line in table] == [
        "2 x the median",
        "3 x the median (this run's)",
        "5 x the median",
        "10 x the median",
        "no limit",
    ]
    headline = run.core["eval_result_metrics"]["reconstruction_quality"]["explained_variance"]
    assert rows[1]["explained_variance"] == pytest.approx(headline, rel=1e-9)


def test_a_limit_that_decides_the_number_is_told(run: LoadedRun) -> None:
    text = "Explained variance depends on the norm limit: told"
    said = {"decides_the_headline": True, "limits": [5], "text": text}
    assert text not in run_notes(run)
    assert f"- {text}" in run_notes(with_extras(run, norm_limit_caution=said))


def test_a_run_that_was_measured_before_the_limits_has_notes(run: LoadedRun, notes: str) -> None:
    old = with_extras(run)
    for key in ("explained_variance_by_norm_limit", "norm_limit_caution"):
        del old.core["eval_result_unstructured"][key]
    assert "norm limit" in notes and "norm limit" not in run_notes(old)


def with_extras(run: LoadedRun, **changes: Any) -> LoadedRun:
    import dataclasses

    extras = {**run.core["eval_result_unstructured"], **changes}
    return dataclasses.replace(run, core={**run.core, "eval_result_unstructured": extras})


def test_a_baseline_is_not_told_to_look_for_its_own_effect(run: LoadedRun) -> None:
    import dataclasses

    plain = run.config.model_copy(update={"lambda_": 0.0})
    assert "lambda=0 and otherwise" not in run_notes(dataclasses.replace(run, config=plain))


def test_notes_are_written_beside_the_run(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    shutil.rmtree(folder / "analysis")
    text = write_run_notes(load_run(folder), folder / NOTES).read_text(encoding="utf-8")
    assert RunFiles(folder).has_pages
    assert "Redundancy, clusters and top contexts: not there" in text


def delta(value: float, low: float | None, high: float | None) -> dict[str, Any]:
    inside = None if low is None else low <= 0 <= high
    return {"value": value, "baseline": 0.5, "low": low, "high": high, "within_noise": inside}


def group(**deltas: dict[str, Any]) -> dict[str, Any]:
    metrics = {name: {"value": 0.5 + entry["value"]} for name, entry in deltas.items()}
    match = {"words": "no baseline with the same settings"}
    return {"deltas": deltas, "metrics": metrics, "match": match, "density_matched": {}}


def test_a_clear_difference_is_said_with_both_values() -> None:
    one = group(rho_1=delta(0.1, 0.05, 0.15), l2_ratio=delta(-0.2, -0.25, -0.15))
    assert verdicts(one, ["rho_1", "l2_ratio"]) == [
        "Autocorrelation rho_1 is higher: 0.600 against 0.500, +0.100 [0.050, 0.150].",
        "L2 ratio is lower: 0.300 against 0.500, -0.200 [-0.250, -0.150].",
    ]


def test_noise_and_what_has_no_interval_are_no_differences() -> None:
    one = group(rho_1=delta(0.1, -0.05, 0.25), density=delta(0.01, None, None))
    assert verdicts(one, ["rho_1", "density"]) == [
        "Within noise, so no difference was shown: Autocorrelation rho_1 (+0.100 [-0.050, 0.250]).",
        "Without an interval, so nothing can be said: Density (+0.01).",
    ]


def test_what_was_matched_is_not_a_result() -> None:
    assert verdicts(group(l0=delta(0.0, 0.0, 0.0)), ["l0"]) == []


def test_without_a_baseline_nothing_is_claimed() -> None:
    assert verdicts(group(), ["rho_1"]) == ["Not compared: no baseline with the same settings."]


def test_equal_density_has_its_own_sentence() -> None:
    entry = {"value": 0.6, "baseline": 0.5, "delta": 0.1, "overlap": 0.75, "reason": None}
    clear = {**entry, "low": 0.05, "high": 0.15, "within_noise": False}
    one = {"density_matched": {"C_8": clear}}
    assert density_verdict(one, "C_8") == (
        "At equal density, Window consistency C_8 is higher: 0.600 against 0.500, "
        "+0.100 [0.050, 0.150]. Overlap 0.750."
    )
    noise = {**entry, "low": -0.05, "high": 0.25, "within_noise": True}
    assert "no difference was shown" in density_verdict({"density_matched": {"C_8": noise}}, "C_8")
    assert density_verdict(one, "rho_1") == ""


def test_notes_and_page_say_how_many_of_the_most_consistent_features_are_layout(
    run: LoadedRun, tmp_path: Path
) -> None:
    contents = Contents.of(run)
    name = f"L_{contents.local_window}" if contents.local_window else contents.window_metric
    shares = run.per_feature["layout_share"]
    order = run.per_feature[str(name)].nan_to_num(nan=-9.0).argsort(descending=True)
    contexts_on = run.per_feature["contexts_on"]
    seen = [j for j in order.tolist() if contexts_on[j] >= contents.summary["seen_contexts"]]
    n = sum(float(shares[j]) > 0.5 for j in seen[:10])
    said = contents.layout_words()
    assert f"{n} are layout" in said and f"largest {name}" in said
    layout = contents.summary["layout"]
    assert layout["n_features"] == int((shares > 0.5).sum())
    assert 0 < layout["token_share"] < 1 and 0 <= layout["energy_share"] <= 1
    assert said in " ".join(run_notes(run).split())
    assert "dataset=speech" not in said  # that is for the embedded plays
    plays = run.config.dataset.model_copy(update={"source": "wheel"})
    config = run.config.model_copy(update={"dataset": plays})
    on_plays = dataclasses.replace(contents, run=dataclasses.replace(run, config=config))
    assert "dataset=speech is the same plays without them" in on_plays.layout_words()
    older = dataclasses.replace(contents, values={**contents.values})
    del older.values["layout_share"]
    assert older.layout_words() == ""
