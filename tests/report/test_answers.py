"""The sentence of a comparison says the numbers of the comparison, and no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import changed, codes, write_run

from tcsae.report.answers import SHOWN, answers
from tcsae.report.comparison import compare_runs
from tcsae.report.notes import comparison_notes

NAMES = ["explained_variance", "l0", "C_8", "L_8", "D_8", "omega_squared"]


def row(
    id_: int, label: str, consistency: str, weight: float, /, **deltas: float
) -> dict[str, Any]:
    """A group with these differences from a baseline of .1 in every metric."""
    return {
        "id": id_,
        "stream": 0,
        "label": label,
        "settings": {"consistency": consistency, "window": 8, "lambda": weight},
        "differs": {"lambda": weight, "consistency": consistency},
        "metrics": {name: {"value": 0.1 + deltas.get(name, 0.0)} for name in NAMES},
        "deltas": {
            name: {"value": v, "low": v - 0.01, "high": v + 0.01, "within_noise": abs(v) < 0.01}
            for name, v in deltas.items()
        },
    }


BASELINE = row(0, "none", "none", 0.0)


def test_the_sentence_has_from_to_the_difference_and_its_interval() -> None:
    loss = row(1, "lambda=1", "scale_free", 1.0, C_8=0.05, L_8=0.04, omega_squared=-0.002)
    (said,) = answers([BASELINE, loss], NAMES, 8)
    assert said.startswith("lambda=1, against the same without the loss: ")
    assert re.search(r"C_8\S* 0\.100 -> 0\.150 \(\+0\.050 \[0\.040, 0\.060\]\)", said)
    assert re.search(r"L_8\S* 0\.100 -> 0\.140 \(\+0\.040 ", said)
    assert re.search(r"0\.100 -> 0\.098 \(-0\.002 \[-0\.012, 0\.008\], within noise\)", said)
    assert "shuffled" not in said


def test_what_is_due_to_order_is_the_loss_less_its_own_control() -> None:
    loss = row(1, "lambda=1", "scale_free", 1.0, C_8=0.05, L_8=0.04)
    control = row(2, "shuffled", "shuffled", 1.0, C_8=0.03, L_8=0.01)
    other = row(3, "shuffled .3", "shuffled", 0.3, C_8=0.02, L_8=0.02)
    (said,) = answers([BASELINE, loss, other, control], NAMES, 8)
    assert "(+0.040) the same loss on shuffled positions makes +0.010; +0.030 is due to" in said
    # A control of another weight is not this loss' control.
    (said,) = answers([BASELINE, loss, other], NAMES, 8)
    assert "shuffled" not in said


def test_many_settings_leave_those_that_last_longest_in_their_order() -> None:
    many = [row(n, f"arm {n}", "scale_free", n, C_8=(n % 10) / 100) for n in range(1, 10)]
    said = answers([BASELINE, *many], NAMES, 8)
    assert [line.partition(",")[0] for line in said] == [f"arm {n}" for n in range(10 - SHOWN, 10)]


def test_nothing_is_said_without_a_baseline() -> None:
    assert answers([row(1, "lambda=1", "scale_free", 1.0)], NAMES, 8) == []
    assert answers([BASELINE], NAMES, 8) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    write_run(root / "a", features=codes(0.3))
    write_run(root / "b", changed(lambda_=1.0), features=codes(0.9, seed=5), error=0.6)
    shuffled = changed(lambda_=1.0, consistency__shuffle_positions=True)
    write_run(root / "c", shuffled, features=codes(0.5, seed=6))
    return root


def test_a_comparison_says_it_first_in_words_and_files(runs: Path) -> None:
    comparison = compare_runs([runs])
    (said,) = comparison.answers
    loss = next(
        g for g in comparison.groups if g["deltas"] and g["settings"]["consistency"] == "scale_free"
    )
    control = next(g for g in comparison.groups if g["settings"]["consistency"] == "shuffled")
    name = next(n for n in comparison.metrics if n.startswith("L_"))
    due = loss["deltas"][name]["value"] - control["deltas"][name]["value"]
    assert f"{due:+.3f} is due to the order of the tokens" in said
    assert comparison.markdown().startswith(said)
    assert comparison.to_json()["answers"] == [said]
    notes = " ".join(comparison_notes(comparison).split())
    assert said in notes and notes.index(said) < notes.index("To keep in mind")
