"""docs/effect.md and README show what docs/effect.json holds, and mark what did not hold."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from typing import Any

import pytest
from helpers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import effect
from pages import block

pytestmark = pytest.mark.documents

FOUND: dict[str, Any] = json.loads(effect.RESULTS.read_text(encoding="utf-8"))


def test_the_pages_hold_what_the_script_makes_of_the_results() -> None:
    readme, page = (p.read_text(encoding="utf-8") for p in (effect.README, effect.PAGE))
    assert block("effect", effect.summary(FOUND)) in readme
    assert block("effect", f"{effect.summary(FOUND)}\n\n{effect.page(FOUND)}") in page


def test_every_change_lies_in_its_interval_and_is_the_difference_of_its_arms() -> None:
    assert set(FOUND) <= set(effect.COLUMNS) and FOUND
    for column in FOUND.values():
        assert column["seeds"] == [0, 1, 2]
        none, one = column["values"]["none"], column["values"]["loss, lambda 1"]
        for name, change in column["at_lambda_1"].items():
            assert change["low"] <= change["value"] <= change["high"]
            between = one[name]["value"] - none[name]["value"]
            assert change["value"] == pytest.approx(between, abs=1e-9)


def test_what_does_not_hold_is_marked() -> None:
    """Each answer turns from plain to `no:` when its figure is spoilt, and back."""
    name = next(iter(FOUND))
    good, bad = deepcopy(FOUND), deepcopy(FOUND)
    for found, factor, sign in ((good, 9.0, 1), (bad, 0.5, -1)):
        column = found[name]
        for entry in column["at_cost"].values():
            if isinstance(entry, dict):
                entry["there"]["value"] = factor * entry["baseline"]["value"]
                entry["change"]["low"] = float(sign)
        column["at_lambda_1"]["explained_variance"]["value"] = 0.0 if sign > 0 else -1.0
        column["at_lambda_1"]["omega_squared"] |= {"value": -0.1 * sign, "low": -0.1 * sign}
        edges = [column["values"][arm]["edge_energy"] for arm in ("none", "loss, lambda 1")]
        edges[1]["value"] = edges[0]["value"] * (1 if sign > 0 else 2)
        column["minus_control"]["L_8"]["low"] = float(sign)
    place = list(good).index(name) + 1
    for found, marked in ((good, False), (bad, True)):
        answers = [row[place] for row in effect.checks(found)]
        assert len(answers) == 6
        assert all(answer.startswith("**no:**") == marked for answer in answers), answers
