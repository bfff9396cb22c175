"""docs/architectures.md shows what its two scripts found; what these do, on a tiny model."""

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
import learning_rates
from compare_peers import ARMS, best_rate, key

from tcsae.base.signals import StopRequest
from tcsae.data.stream import open_stream

FOUND = json.loads((REPOSITORY / "docs" / "peers.json").read_text(encoding="utf-8"))


def a_run(arm: str = "ours", lr: float = 1e-3, seed: int = 0, **found: float) -> dict[str, Any]:
    values = {"explained_variance": 0.5, "ce_score": 0.9, "live": 1.0, "l0_as_trained": 32.0}
    return {"architecture": "topk", "arm": arm, "lr": lr, "seed": seed, **values, **found}


@pytest.mark.documents
def test_the_page_is_what_the_comparison_found() -> None:
    page = (REPOSITORY / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert compare_peers.page_block(FOUND) in page


@pytest.mark.documents
def test_the_page_has_the_rates_as_they_were_measured() -> None:
    docs = REPOSITORY / "docs"
    runs = json.loads((docs / "rates.json").read_text(encoding="utf-8"))
    assert learning_rates.page_block(runs) in (docs / "architectures.md").read_text(
        encoding="utf-8"
    )


def test_the_rates_of_one_kind_of_run_stand_in_one_line() -> None:
    shared = {"sae": "topk", "encoder_scale": 0.1, "steps": 9, "tokens_per_step": 8, "seed": 0}
    measured = {"explained_variance": 0.5, "l0": 32.0, "live": 1.0, "target_l0": None}
    run = {**shared, **measured, "lr": 3e-3}
    other = run | {"lr": 1e-3, "explained_variance": 0.25}
    last = learning_rates.table([run, other, other | {"seed": 1}]).splitlines()[2:]
    assert last == [
        "| topk | 0.1 | 9 x 8 |  | 0 | 0.2500 / 32.0 / 1.000 | 0.5000 / 32.0 / 1.000 |",
        "| topk | 0.1 | 9 x 8 |  | 1 | 0.2500 / 32.0 / 1.000 |  |",
    ]


@pytest.mark.parametrize("sae", ["persistent", "standard"])
def test_a_job_is_measured_on_what_is_held_out(
    sae: str, tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    config = small_config(tiny_gpt2, texts, sae=sae, store__dir=str(tmp_path), training__lr="1e-2")
    stream = open_stream(config, StopRequest())
    run = learning_rates.measured(config, stream)
    assert run["explained_variance"] < 1 and run["l0"] > 0 and 0 < run["live"] <= 1
    described = learning_rates.described(config, f"sae={sae} training.lr=1e-2")
    assert (described["sae"], described["lr"], described["steps"]) == (sae, 1e-2, 12)


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
        pytest.importorskip("dictionary_learning", reason="dictionary_learning is not installed")
    monkeypatch.setattr(compare_peers, "L0", 4)
    changes = {"sae": sae, "sae__k": "4", "training__lr": "1e-2", "store__dir": str(tmp_path)}
    changes["training__tokens"] = "12288"  # 96 steps: SAELens' b_dec has far to go from 0
    config = small_config(tiny_gpt2, texts, **changes)
    stream = open_stream(config, StopRequest())
    run = compare_peers.measured(compare_peers.trained(arm, config, stream), config, stream)
    assert run["l0"] == pytest.approx(4, rel=0.02)
    assert 0 < run["explained_variance"] < 1
    assert all(torch.tensor(value).isfinite() for value in run.values())
