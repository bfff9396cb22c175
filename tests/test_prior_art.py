"""docs/prior_art.md shows what its JSON holds."""

from __future__ import annotations

import json
import sys

import pytest
from helpers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import prior_art

pytestmark = pytest.mark.documents


def test_the_page_holds_the_tables_of_its_results() -> None:
    found = json.loads(prior_art.RESULTS.read_text(encoding="utf-8"))
    assert prior_art.tables(found) in prior_art.PAGE.read_text(encoding="utf-8")
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 12 and all(row["seeds"] == [0, 1, 2] for row in rows.values())
    (baseline,) = (row for row in rows.values() if row["is_baseline"])
    for row in rows.values():
        for name, entry in row["deltas"].items():
            assert entry["low"] <= entry["value"] <= entry["high"]
            assert entry["within_noise"] == (entry["low"] <= 0 <= entry["high"])
            if name in row["metrics"]:
                change = row["metrics"][name]["value"] - baseline["metrics"][name]["value"]
                # At matched L0: the baseline has one L0 only, near that of every arm.
                assert abs(change - entry["value"]) < 0.002
