from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tcsae.metrics.autocorrelation import autocorrelation, window_consistency
from tcsae.metrics.document import LongLags, local_part, nested_shares
from tcsae.metrics.position import position_dependence
from tcsae.metrics.suite import ConsistencySuite
from tests.metrics import synthetic
from tests.metrics.synthetic import seeded


def mixed_features(n_contexts: int, generator: torch.Generator) -> Tensor:
    """AR(1), runs, token-local, constant, dead: [n_contexts, 32, 5]."""
    kinds = [
        synthetic.ar1(n_contexts, 32, 1, 0.95, generator).relu(),
        synthetic.periodic_runs(n_contexts, 32, 1, 5, 15, generator),
        synthetic.token_local(n_contexts, 32, 1, 0.2, generator),
        torch.full((n_contexts, 32, 1), 0.3, dtype=torch.float64),
        torch.zeros(n_contexts, 32, 1, dtype=torch.float64),
    ]
    return torch.cat(kinds, dim=2)


def in_json(summary: dict[str, Any]) -> dict[str, Any]:
    """Through strict JSON and back: fails on NaN and infinity."""
    return json.loads(json.dumps(summary, allow_nan=False))


def test_every_number_is_that_of_the_functions_it_is_made_of() -> None:
    g = seeded()
    f = mixed_features(40, g)
    segments, valid = synthetic.random_masks(40, 32, g, boundary=0.05)
    suite = ConsistencySuite(5, 32)
    suite.update(f, segments=segments, valid=valid)
    values = suite.per_feature()
    rho = autocorrelation(f, 8, segments=segments, valid=valid)
    position = position_dependence(f, valid=valid)
    assert torch.allclose(values["rho"], rho, equal_nan=True)
    assert torch.allclose(values["C_4"], window_consistency(rho, 4), equal_nan=True)
    assert torch.allclose(values["eta_squared"], position.eta_squared, equal_nan=True)
    c4 = values["C_4"][:3]
    entry = suite.summary()["metrics"]["C_4"]
    assert entry["n"] == 3
    assert entry["mean"] == pytest.approx(c4.mean().item())
    assert entry["median"] == pytest.approx(c4.median().item())
    energy = values["c0"][:3]
    assert entry["energy_weighted"] == pytest.approx((c4 @ energy / energy.sum()).item())


def test_live_features_are_those_that_fire() -> None:
    suite = ConsistencySuite(5, 32)
    suite.update(mixed_features(64, seeded(1)))
    summary = in_json(suite.summary())
    assert (summary["n_live"], summary["n_features"], summary["frac_alive"]) == (4, 5, 0.8)
    assert (summary["n_contexts"], summary["n_valid_tokens"]) == (64, 64 * 32)
    assert summary["metrics"]["density"]["n"] == 4
    assert summary["metrics"]["rho_1"]["n"] == 3, "a constant feature has no autocorrelation"


def test_consistency_ranks_features_as_they_were_made() -> None:
    suite = ConsistencySuite(5, 32, n_blocks=0)
    suite.update(mixed_features(2000, seeded(2)))
    c8 = suite.per_feature()["C_8"]
    assert c8[0] > c8[1] > c8[2]
    assert c8[0] > 0.7 and abs(c8[2]) < 0.01
    assert c8[3:].isnan().all()


def test_intervals_hold_the_estimate_and_are_ordered() -> None:
    suite = ConsistencySuite(5, 32)
    suite.update(mixed_features(200, seeded(3)), inputs=torch.rand(200, 32, 3))
    summary = in_json(suite.summary())
    for name, entry in summary["metrics"].items():
        if name in ("D_8", "L_8"):
            assert "3/4 of the context is 24" in entry["reason"]
            continue
        if name.endswith("sparse"):
            assert "less than 10 %" in entry["reason"] or name == "L_8_sparse", name
            continue
        if name in ("tau_int", "correlation_length"):
            # Of AR(1) of .95 the last lag, 8, says too little.
            assert entry["energy_weighted"] is None and entry["n_censored"] >= 1
            assert entry["reason"].startswith("cannot tell: of features with")
            continue
        if name == "eta_squared":
            assert "omega_squared is without that" in entry["interval_reason"]
            assert entry["energy_weighted_interval"] == [None, None]
            continue
        low, high = entry["energy_weighted_interval"]
        assert low <= entry["energy_weighted"] <= high, name
        low, high = entry["median_interval"]
        assert low <= high, name
        assert entry["reason"] is None, name
    curve = summary["autocorrelation"]
    assert curve["rho"][0] == pytest.approx(1)
    for low, rho, high in zip(curve["low"][1:], curve["rho"][1:], curve["high"][1:], strict=True):
        assert low < rho < high
    low, high = summary["smoothness"]["interval"]
    assert low < summary["smoothness"]["value"] < high


def test_resamples_scatter_about_the_estimates() -> None:
    g = seeded(12)
    f = torch.cat([synthetic.ar1(300, 32, 4, 0.95, g) * 3, synthetic.ar1(300, 32, 8, 0.3, g)], 2)
    segments, valid = synthetic.random_masks(300, 32, g, boundary=0.05)
    suite = ConsistencySuite(12, 32, windows=(2, 8), n_boot=200)
    suite.update(f[:100] + 12, segments=segments[:100], valid=valid[:100])
    first = suite.draws()["C_8"]
    suite.update(f[100:] + 12, segments=segments[100:], valid=valid[100:])
    draws, summary = suite.draws(), suite.summary()
    assert not torch.equal(draws["C_8"], first), "later contexts count"
    for name in ("C_2", "C_8", "rho_1"):
        entry = summary["metrics"][name]
        assert abs(entry["energy_weighted"] - entry["mean"]) > 0.1
        weighted = draws[name][:, 0]
        assert abs(weighted.mean() - entry["energy_weighted"]) < 0.5 * weighted.std(), name
    curve = torch.tensor(summary["autocorrelation"]["rho"])
    assert (draws["autocorrelation"].mean(0) - curve).abs().max() < 0.01


def test_batches_give_the_same_summary_as_all_at_once() -> None:
    g = seeded(4)
    f, x = mixed_features(50, g), synthetic.white_noise(50, 32, 3, generator=g)
    segments, valid = synthetic.random_masks(50, 32, g, boundary=0.03)
    whole, split = (ConsistencySuite(5, 32, windows=(2, 8), n_boot=100) for _ in range(2))
    whole.update(f, segments=segments, valid=valid, inputs=x)
    parts = (tensor.split([13, 30, 7]) for tensor in (f, segments, valid, x))
    for part_f, part_segments, part_valid, part_x in zip(*parts, strict=True):
        split.update(part_f, segments=part_segments, valid=part_valid, inputs=part_x)
    for name, value in whole.per_feature().items():
        theirs = split.per_feature()[name]
        assert torch.allclose(theirs.double(), value.double(), atol=1e-9, equal_nan=True), name
    for name, value in whole.draws().items():
        assert torch.allclose(split.draws()[name], value, atol=2e-3, equal_nan=True), name
    split.reset()
    split.update(f, segments=segments, valid=valid, inputs=x)
    assert split.summary() == whole.summary()


def test_values_at_invalid_positions_change_nothing() -> None:
    g = seeded(5)
    f = mixed_features(40, g)
    segments, valid = synthetic.random_masks(40, 32, g)
    summaries = []
    for garbage in (0.0, 1e6, torch.nan):
        suite = ConsistencySuite(5, 32, windows=(2,), n_boot=50)
        suite.update(torch.where(valid[..., None], f, garbage), segments=segments, valid=valid)
        summaries.append(suite.summary())
    assert summaries[0] == summaries[1] == summaries[2]


def test_same_contexts_draw_the_same_resamples_so_that_runs_can_be_paired() -> None:
    g = seeded(6)
    common = synthetic.ar1(100, 32, 8, 0.9, g)
    draws = []
    for noise in (0.1, 0.2):
        suite = ConsistencySuite(8, 32, windows=(4,))
        suite.update(common + noise * synthetic.white_noise(100, 32, 8, generator=g) + 10)
        draws.append(suite.draws()["C_4"][:, 0])
    paired = (draws[0] - draws[1]).std()
    assert paired < 0.3 * draws[0].std()


def test_every_feature_dead_is_said_in_words() -> None:
    suite = ConsistencySuite(3, 16)
    suite.update(torch.zeros(20, 16, 3))
    summary = in_json(suite.summary())
    assert summary["n_live"] == 0
    assert "no feature fired" in summary["interval_reason"]
    for entry in summary["metrics"].values():
        assert entry["median"] is None and entry["energy_weighted"] is None
        assert "no feature fired" in entry["reason"]
    assert "no feature fired" in summary["autocorrelation"]["reason"]


def test_a_single_context_is_said_in_words() -> None:
    suite = ConsistencySuite(3, 16)
    suite.update(torch.rand(1, 16, 3, generator=seeded(7)) - 0.5)
    summary = in_json(suite.summary())
    assert summary["metrics"]["C_4"]["median"] is None
    assert "single context" in summary["metrics"]["C_4"]["reason"]
    assert summary["metrics"]["density"]["median"] is not None
    assert "too few" in summary["interval_reason"]
    assert summary["metrics"]["density"]["median_interval"] == [None, None]


def test_no_valid_token_at_all_is_said_in_words() -> None:
    suite = ConsistencySuite(3, 16)
    suite.update(torch.rand(10, 16, 3), valid=torch.zeros(10, 16, dtype=torch.bool))
    summary = in_json(suite.summary())
    assert (summary["n_valid_tokens"], summary["n_live"]) == (0, 0)
    assert all(entry["reason"] for entry in summary["metrics"].values())


def test_only_constant_features_are_said_in_words() -> None:
    suite = ConsistencySuite(3, 16)
    suite.update(torch.full((40, 16, 3), 0.3))
    summary = in_json(suite.summary())
    assert summary["n_live"] == 3
    assert "varies" in summary["metrics"]["C_4"]["reason"]
    assert summary["metrics"]["density"]["median"] == 1.0


def test_windows_that_cannot_be_measured_are_left_out_with_the_reason() -> None:
    f = mixed_features(20, seeded(8))
    suite = ConsistencySuite(5, 32, windows=(2, 8, 32))
    suite.update(f, segments=(torch.arange(32) // 4).expand(20, 32))
    summary = in_json(suite.summary())
    assert summary["windows"] == [2]
    assert "largest measured is 8" in summary["windows_left_out"]["32"]
    assert "no segment" in summary["windows_left_out"]["8"]
    assert "C_8" not in summary["metrics"]
    assert summary["autocorrelation"]["rho"][4:] == [None] * 5
    assert summary["autocorrelation"]["reason"]


def test_without_blocks_there_are_no_intervals_and_a_reason() -> None:
    suite = ConsistencySuite(5, 32, n_blocks=0)
    suite.update(mixed_features(64, seeded(9)))
    summary = in_json(suite.summary())
    assert "none were asked for" in summary["interval_reason"]
    assert summary["metrics"]["C_4"]["energy_weighted"] is not None
    assert summary["metrics"]["C_4"]["energy_weighted_interval"] == [None, None]
    assert suite.draws() == {}


def test_smoothness_without_inputs_is_said_in_words() -> None:
    suite = ConsistencySuite(5, 32, n_blocks=0)
    suite.update(mixed_features(16, seeded(10)))
    assert suite.summary()["smoothness"]["value"] is None
    assert "inputs" in suite.summary()["smoothness"]["reason"]
    assert "smoothness" not in suite.per_feature()


def test_mistakes_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="2 positions or more"):
        ConsistencySuite(3, 16, windows=(1, 4))
    with pytest.raises(ValueError, match="no batch"):
        ConsistencySuite(3, 16).summary()


def test_contexts_too_short_for_any_lag_still_give_what_can_be_had() -> None:
    suite = ConsistencySuite(4, 3)
    suite.update(torch.rand(30, 3, 4, generator=seeded(11)) - 0.3)
    summary = in_json(suite.summary())
    assert summary["max_lag"] == 0 and summary["windows"] == []
    assert summary["metrics"]["persistence"]["median"] is not None


def test_document_local_and_sparse_parts_are_made_of_the_functions_for_them() -> None:
    g = seeded(13)
    f = torch.cat(
        [
            mixed_features(64, g),
            synthetic.markov_runs(64, 32, 2, 0.8, 0.99, g) * (1 + torch.rand(64, 1, 2)),
        ],
        2,
    )
    segments, valid = synthetic.random_masks(64, 32, g, boundary=0.02)
    suite = ConsistencySuite(7, 32, windows=(2, 4), n_boot=100)
    for part in (slice(0, 30), slice(30, 64)):
        suite.update(f[part], segments=segments[part], valid=valid[part])
    values, summary = suite.per_feature(), in_json(suite.summary())
    long = LongLags(7, 32, [(8, 24), (16, 24)])
    long.update(f, segments=segments, valid=valid)
    document = long.compute()
    for index, w in enumerate((2, 4)):
        c, d = values[f"C_{w}"], values[f"D_{w}"]
        assert torch.allclose(d, document[index], atol=1e-9, equal_nan=True)
        assert torch.allclose(values[f"L_{w}"], local_part(c, d), equal_nan=True)
    assert summary["shares_window"] == 4
    shares = nested_shares(values["omega_squared"], values["D_4"], values["C_4"])
    for name, value in shares.items():
        assert torch.allclose(values[name], value, equal_nan=True)
    total = sum(summary["metrics"][name]["energy_weighted"] for name in shares)
    assert total == pytest.approx(1)
    varies = values["c0"] > 0
    e, c, d = (values[name][varies] for name in ("c0", "C_4", "D_4"))
    entry = summary["metrics"]["L_4"]
    assert entry["energy_weighted"] == pytest.approx(float((e @ (c - d)) / (e @ (1 - d))))
    sparse = values["density"][varies] < 0.1
    assert 0 < sparse.sum() < len(sparse)
    entry = summary["metrics"]["L_4_sparse"]
    e, c, d = e[sparse], c[sparse], d[sparse]
    assert entry["energy_weighted"] == pytest.approx(float((e @ (c - d)) / (e @ (1 - d))))
    assert summary["metrics"]["C_4_sparse"]["energy_weighted"] == pytest.approx(
        float(e @ c / e.sum())
    )
    for name in ("D_2", "L_4", "L_4_sparse", "C_4_sparse", "share_window"):
        low, high = summary["metrics"][name]["energy_weighted_interval"]
        assert low < summary["metrics"][name]["energy_weighted"] < high, name


def test_the_99th_percentile_is_in_every_entry() -> None:
    suite = ConsistencySuite(200, 32, n_blocks=0, windows=(2,))
    suite.update(synthetic.ar1(20, 32, 200, 0.8, seeded(14)))
    entry = suite.summary()["metrics"]["C_2"]
    assert entry["q99"] == pytest.approx(suite.per_feature()["C_2"].quantile(0.99).item())


def test_energy_at_the_edge_has_an_interval_and_pairs() -> None:
    f = synthetic.token_local(64, 32, 5, 0.3, seeded(15))
    f[:, 1:8] *= 3.0
    suites = [ConsistencySuite(5, 32, windows=(2,), n_boot=200) for _ in range(2)]
    for suite, scale in zip(suites, (1.0, 2.0), strict=True):
        suite.update(f * scale)
    summary = in_json(suites[0].summary())
    entry = summary["edge_energy"]
    low, high = entry["interval"]
    assert low < entry["value"] < high and 8.0 < entry["value"] < 10.0
    assert summary["energy_by_position"][4] == pytest.approx(9.0, rel=0.2)
    drawn = [suite.draws()["edge_energy"] for suite in suites]
    assert torch.allclose(drawn[0], drawn[1]), "a matter of scale only, in every resample"
    short = ConsistencySuite(5, 6, windows=(2,))
    short.update(f[:, :6])
    assert "position 8" in short.summary()["edge_energy"]["reason"]
    assert "edge_energy" not in short.draws()


def test_smoothness_of_the_first_group_and_the_rest() -> None:
    g = seeded(16)
    f, x = mixed_features(60, g), synthetic.white_noise(60, 32, 3, generator=g)
    _, valid = synthetic.random_masks(60, 32, g)
    suite = ConsistencySuite(5, 32, windows=(2,), n_boot=50, groups=[2, 1, 2])
    suite.update(f, valid=valid, inputs=x)
    summary = in_json(suite.summary())
    parts = {"smoothness_first_group": slice(0, 2), "smoothness_second_group": slice(2, 5)}
    for name, part in (parts | {"smoothness": slice(0, 5)}).items():
        alone = ConsistencySuite(f[..., part].shape[2], 32, windows=(2,), n_boot=50)
        alone.update(f[..., part], valid=valid, inputs=x)
        assert summary[name]["value"] == pytest.approx(alone.summary()["smoothness"]["value"])
        assert torch.allclose(suite.draws()[name], alone.draws()["smoothness"])
    plain = ConsistencySuite(5, 32, windows=(2,), n_boot=50)
    plain.update(f, valid=valid, inputs=x)
    assert "smoothness_first_group" not in plain.summary()
