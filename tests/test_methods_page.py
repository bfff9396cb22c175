"""docs/methods.md shows what scripts/compare_peers.py found; what that script does, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPOSITORY, small_config

sys.path.insert(0, str(REPOSITORY / "scripts"))

import compare_peers
from compare_peers import ARMS, best_rate, key

from tcsae.data.stream import open_stream
from tcsae.signals import StopRequest

FOUND = json.loads((REPOSITORY / "docs" / "peers.json").read_text(encoding="utf-8"))


def a_run(arm: str = "ours", lr: float = 1e-3, seed: int = 0, **found: float) -> dict[str, Any]:
    values = {"explained_variance": 0.5, "ce_score": 0.9, "live": 1.0, "l0_as_trained": 32.0}
    return {"architecture": "topk", "arm": arm, "lr": lr, "seed": seed, **values, **found}


def test_the_page_is_what_the_comparison_found() -> None:
    page = (REPOSITORY / "docs" / "methods.md").read_text(encoding="utf-8")
    assert compare_peers.page_block(FOUND) in page


def test_every_run_of_the_page_is_at_the_same_l0_and_none_is_there_twice() -> None:
    runs = FOUND["runs"]
    assert len(set(map(key, runs))) == len(runs)
    for run in runs:
        assert run["l0"] == pytest.approx(compare_peers.L0, rel=0.01), key(run)


def test_the_best_rate_is_by_the_first_seed_alone() -> None:
    runs = [
        a_run(lr=1e-3, explained_variance=0.6),
        a_run(lr=3e-3, explained_variance=0.7),
        a_run(lr=1e-3, seed=1, explained_variance=0.9),
        a_run("saelens", lr=6e-3, explained_variance=0.8),
    ]
    assert best_rate(runs, "topk", "ours") == 3e-3
    assert best_rate(runs, "jumprelu", "ours") is None


def test_a_better_peer_is_said_to_be_better() -> None:
    runs = [a_run(explained_variance=0.6), a_run("dl_1", explained_variance=0.65)]
    (said,) = compare_peers.sentences([*runs, a_run("saelens", explained_variance=0.5)])
    assert said == f"topk: ours -0.0500 beside the best peer, {ARMS['dl_1']}."


def test_what_is_recorded_is_kept_and_another_setting_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    assert compare_peers.recorded(out, {"steps": 1}) == []
    compare_peers.recorded(out, {"steps": 1}, a_run())
    assert compare_peers.recorded(out, {"steps": 1}, a_run("saelens")) == [
        a_run(),
        a_run("saelens"),
    ]
    with pytest.raises(SystemExit, match="another steps"):
        compare_peers.recorded(out, {"steps": 2})


@pytest.mark.parametrize("sae", ["topk", "batchtopk"])
@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_trains_and_is_measured_at_the_l0(
    sae: str, arm: str, tiny_gpt2: Path, texts: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    if arm.startswith("dl"):
        compare_peers.without_nnsight()
        pytest.importorskip("dictionary_learning", reason="NOT TESTED: no dictionary_learning")
    monkeypatch.setattr(compare_peers, "L0", 4)
    changes = {"sae": sae, "sae__k": "4", "training__lr": "1e-2", "store__dir": str(tmp_path)}
    changes["training__tokens"] = "12288"  # 96 steps: SAELens' b_dec has far to go from 0
    config = small_config(tiny_gpt2, texts, **changes)
    stream = open_stream(config, StopRequest())
    run = compare_peers.measured(compare_peers.trained(arm, config, stream), config, stream)
    assert run["l0"] == pytest.approx(4, rel=0.02)
    assert 0 < run["explained_variance"] < 1
    assert all(torch.tensor(value).isfinite() for value in run.values())
