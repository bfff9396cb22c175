"""docs/methods.md shows what scripts/compare_peers.py found."""

from __future__ import annotations

import json
import sys

from helpers import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import compare_peers


def test_the_page_holds_the_comparison_with_the_peers() -> None:
    docs = REPOSITORY / "docs"
    rows = json.loads((docs / "peers.json").read_text(encoding="utf-8"))
    assert compare_peers.table(rows) in (docs / "methods.md").read_text(encoding="utf-8")
    named = {row["architecture"] for row in rows}
    assert named >= {"standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"}
    for row in rows:
        if row["penalty"] != "tanh":
            assert row["difference"] > -0.01, row["architecture"]
