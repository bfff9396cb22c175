"""The analysis of planted features: every file says what was planted."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config
from torch import Tensor

import tcsae.measure.analysis_pass
from tcsae.base.errors import Interrupted
from tcsae.base.signals import StopRequest
from tcsae.config.sae import config_class
from tcsae.data.batches import ActivationBatches, Calibration
from tcsae.data.contexts import Contexts
from tcsae.data.language_model import LanguageModel
from tcsae.measure.analysis import Analysis, analyse
from tcsae.measure.analysis_pass import _most_position_bound
from tcsae.metrics.suite import ConsistencySuite
from tcsae.metrics.units import Units
from tcsae.sae.registry import sae_class

N, T, F = 64, 16, 24
# Planted: 0 and its copy 1, two positions later; 2 and 3, one direction early and late; families
# 4..11 and 12..19; 20 bound to its position; 21 and 22 on their own; 23 dead.
FAMILIES = (range(4, 12), range(12, 20))
EARLY, LATE = slice(1, 8), slice(8, T)


def planted(n_contexts: int = N) -> Tensor:
    """Activations that the identity encoder turns into features [N, T, F]."""
    g = torch.Generator().manual_seed(0)
    chance = torch.rand(n_contexts, T, F, generator=g)
    size = 1 + torch.rand(n_contexts, T, F, generator=g)
    on = chance < 0.1
    on[:, 2:, 1] = on[:, :-2, 0]
    size[:, 2:, 1] = size[:, :-2, 0]
    on[:, LATE, 2], on[:, EARLY, 3] = False, False
    for family in FAMILIES:
        together = torch.rand(n_contexts, T, 1, generator=g) < 0.2
        on[..., family] = together & (chance[..., family] < 0.8)
    on[..., 20] = (torch.arange(T) == 5) & (chance[..., 20] < 0.9)
    on[..., 23] = False
    return on * size


@dataclass
class Source:
    """Activations that are simply there."""

    contexts: Contexts
    x: Tensor

    def activations(self, indices: Tensor) -> Tensor:
        return self.x[indices]


@dataclass
class Case:
    """What `analyse` is given, and what it came to."""

    analysis: Analysis
    features: Tensor
    valid: Tensor
    ids: Tensor


def run_analysis(
    weights: Path,
    texts: Path,
    x: Tensor,
    stop: StopRequest | None = None,
    documents: Tensor | None = None,
) -> Case:
    config = small_config(weights, texts)
    model = LanguageModel(config.model, config.layer)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.vocabulary, x.shape[:2], generator=g, dtype=torch.int32)
    # Tokens of a family's own, for its name.
    family_on = (x[..., FAMILIES[0][0] : FAMILIES[0][-1] + 1] > 0).any(-1)
    ids[family_on] = 100
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[:, 0] = False
    contexts = Contexts(ids, torch.zeros_like(ids), valid, ("text",) * len(x))
    if documents is not None:
        object.__setattr__(contexts, "documents", documents)
    batches = ActivationBatches(
        Source(contexts, x), Calibration(1.0, float("inf"), 0.0, x[valid]), "cpu"
    )
    cfg = config_class("standard")(d_sae=F)
    sae = sae_class("standard")(cfg, F, torch.Generator().manual_seed(2))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(F))
        sae.W_dec.copy_(torch.eye(F))
        sae.W_dec[1], sae.W_dec[3] = sae.W_dec[0], sae.W_dec[2]
    suite = ConsistencySuite(F, T, max_lag=8, n_boot=100)
    suite.update(x, valid=valid)
    per_feature = {k: v.float() for k, v in suite.per_feature().items()}
    analysis = analyse(sae, config, model, batches, per_feature, stop or StopRequest(), 4)
    return Case(analysis, x * valid[..., None], valid, ids)


@pytest.fixture(scope="module")
def case(tiny_gpt2: Path, texts: Path) -> Case:
    return run_analysis(tiny_gpt2, texts, planted())


# ------------------------------------------------------------------------------- redundancy


def test_a_delayed_copy_is_the_one_redundant_pair(case: Case) -> None:
    redundant = case.analysis.redundancy["redundant"]
    assert redundant["groups"] == [[0, 1]] and redundant["n_redundant"] == 1
    (pair,) = redundant["examples"]
    assert pair["features"] == [0, 1] and pair["lag"] == 2 and pair["correlation"] > 0.9
    assert redundant["redundant_share"] == pytest.approx(1 / 23)
    tensors = case.analysis.correlation
    assert tensors["pairs"].tolist() == [[0, 1]] and tensors["pair_lag"].tolist() == [2]


def test_companions_are_those_that_correlate_most_without_a_lag(case: Case) -> None:
    tensors = case.analysis.correlation
    rows, values = tensors["together"], tensors["together_correlation"]
    assert rows.shape == values.shape == (len(tensors["together_feature"]), 5)
    R = torch.corrcoef(case.features[case.valid].T.double()).nan_to_num().fill_diagonal_(-1.0)
    known = rows[:, 0] >= 0
    assert known.sum() > 10
    first = R[tensors["together_feature"][known], rows[known, 0]]
    # The suite's coefficients are centred by position: near those over all tokens.
    assert torch.allclose(first, values[known, 0].double(), atol=0.1)
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert not (rows == tensors["together_feature"][:, None]).any()


def test_early_and_late_forms_of_one_direction_are_twins(case: Case) -> None:
    twins = case.analysis.redundancy["twins"]
    assert [e["features"] for e in twins["examples"]] == [[2, 3]]
    assert case.analysis.correlation["twins"].tolist() == [[2, 3]]


def test_effective_rank_is_that_of_the_correlation_matrices_of_two_halves(case: Case) -> None:
    half, R = Units.of_contexts(N).halves(), []
    for side in (~half, half):
        R.append(torch.corrcoef(case.features[side][case.valid[side]][:, :23].double().T))
    expected = 23**2 / float((R[0] * R[1]).fill_diagonal_(1).sum())
    assert case.analysis.redundancy["effective_rank"] == pytest.approx(expected, rel=1e-4)
    assert case.analysis.redundancy["effective_rank_features"] == 23


def test_documents_are_the_unit_where_they_are_known(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    documents = torch.arange(N) // 2
    case = run_analysis(tiny_gpt2, texts, planted(), documents=documents)
    half, R = Units(documents).halves(), []
    for side in (~half, half):
        R.append(torch.corrcoef(case.features[side][case.valid[side]][:, :23].double().T))
    expected = 23**2 / float((R[0] * R[1]).fill_diagonal_(1).sum())
    redundancy = case.analysis.redundancy
    assert redundancy["effective_rank"] == pytest.approx(expected, rel=1e-4)
    assert redundancy["n_documents"] == 32
    assert case.analysis.specialization["summary"]["n_documents"] == 32
    assert [e["features"] for e in redundancy["twins"]["examples"]] == [[2, 3]]


def test_few_documents_cannot_tell(tiny_gpt2: Path, texts: Path, tmp_path: Path) -> None:
    case = run_analysis(tiny_gpt2, texts, planted(), documents=torch.arange(N) % 4)
    told = assert_writes(case.analysis, tmp_path)
    redundancy, summary = told["redundancy.json"], told["specialization.json"]["summary"]
    assert redundancy["n_documents"] == summary["n_documents"] == 4
    assert redundancy["effective_rank"] is None
    assert "cannot tell" in redundancy["effective_rank_reason"]
    assert redundancy["twins"]["twinned_share"] is None
    assert "cannot tell" in redundancy["twins"]["twinned_share_reason"]
    for entry in redundancy["position_correlation"]:
        assert entry["toeplitz_share"] is None and "cannot tell" in entry["toeplitz_share_reason"]
    for name in ("significant", "modularity_excess", "ari_halves"):
        assert summary[name] is None and "cannot tell" in summary[f"{name}_reason"]


def test_only_features_bound_to_positions_above_their_noise_are_listed() -> None:
    known = {
        "density": torch.tensor([0.5, 0.5, 0.5, 0.001]),
        "omega_squared": torch.tensor([0.2, 0.3, 0.4, 0.9]),
    }
    assert _most_position_bound(known, 0.01) == [2, 1, 0]
    known["omega_squared_low"] = torch.tensor([0.1, -0.1, torch.nan, 0.8])
    assert _most_position_bound(known, 0.01) == [0]


def test_the_most_position_bound_feature_leads_its_list(case: Case) -> None:
    listed = case.analysis.redundancy["position_correlation"]
    assert listed[0]["feature"] == 20 and listed[0]["omega_squared"] > 0.5
    assert len(listed[0]["diagonal_means"]) == T
    tensors = case.analysis.correlation
    assert tensors["position_features"].tolist() == [entry["feature"] for entry in listed]
    assert tensors["position_correlation"].shape == (len(listed), T, T)


# ------------------------------------------------------------------------------ the picture


def test_the_picture_has_the_coefficients_of_its_cells(case: Case) -> None:
    tensors = case.analysis.correlation
    order, edges = tensors["order"], tensors["edges"]
    assert sorted(order.tolist()) == list(range(23))
    R = torch.corrcoef(case.features[case.valid][:, :23].double().T)[order][:, order]
    assert edges.tolist() == list(range(24))  # fewer features than cells
    off = ~torch.eye(23, dtype=torch.bool)
    for name in ("mean", "largest"):
        assert torch.allclose(tensors[name][off].double(), R[off], atol=1e-5)
        assert tensors[name].diagonal().isnan().all()


def test_cells_of_several_features_leave_out_the_diagonal(
    tiny_gpt2: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcsae.measure.analysis_pass, "CELLS", 11)
    case = run_analysis(tiny_gpt2, texts, planted())
    tensors = case.analysis.correlation
    order, edges = tensors["order"], tensors["edges"].tolist()
    R = torch.corrcoef(case.features[case.valid][:, :23].double().T)[order][:, order]
    assert len(edges) == 12 and edges[0] == 0 and edges[-1] == 23
    for a in range(11):
        for b in range(11):
            rows, columns = (torch.arange(edges[c], edges[c + 1]) for c in (a, b))
            cell = R[rows][:, columns][rows[:, None] != columns]
            assert float(tensors["mean"][a, b]) == pytest.approx(float(cell.mean()), abs=1e-5)
            assert float(tensors["largest"][a, b]) == pytest.approx(float(cell.max()), abs=1e-5)


def test_the_picture_is_ordered_by_cluster(case: Case) -> None:
    cluster = torch.tensor(case.analysis.specialization["features"]["cluster"])
    placed = cluster[case.analysis.correlation["order"]].tolist()
    labels = [label for i, label in enumerate(placed) if i == 0 or placed[i - 1] != label]
    assert len(labels) == len(set(labels))
    assert case.analysis.correlation["cell_cluster"].tolist() == placed


# ----------------------------------------------------------------------------- the families


def test_families_are_found_and_named_by_their_tokens(case: Case) -> None:
    told = case.analysis.specialization
    cluster = told["features"]["cluster"]
    for family in FAMILIES:
        assert len({cluster[j] for j in family}) == 1 and cluster[family[0]] >= 0
    assert cluster[FAMILIES[0][0]] != cluster[FAMILIES[1][0]]
    own = told["clusters"][cluster[FAMILIES[0][0]]]
    assert own["size"] >= 8 and set(own["features"]) & set(FAMILIES[0])
    named = case.analysis.top_tokens["tokens"]["100"]
    assert own["tokens"][0]["text"] == named and named.strip() in own["name"]
    assert told["summary"]["n_clusters"] == len(told["clusters"])


def test_columns_describe_every_feature(case: Case) -> None:
    columns = case.analysis.specialization["features"]
    assert {len(column) for column in columns.values()} == {F}
    density = (case.features[case.valid] > 0).double().mean(0)
    for j in range(23):
        assert 10 ** columns["log_density"][j] == pytest.approx(float(density[j]), rel=1e-4)
        assert columns["live"][j] is True and columns["top_tokens"][j]
    assert columns["live"][23] is False and columns["log_density"][23] is None
    assert columns["top_tokens"][23] == [] and columns["cluster"][23] == -1
    assert columns["x"][4] is not None and columns["x"][23] is None


# ----------------------------------------------------------------------------- top contexts


def test_top_contexts_are_those_of_the_largest_activations(case: Case) -> None:
    top, k = case.analysis.top_contexts, case.analysis.top_tokens["k"]
    assert top["features"].tolist() == list(range(F))
    for j in (0, 7, 20):
        best, at = case.features[..., j].max(1)
        order = best.argsort(descending=True, stable=True)[:k]
        row = top["context"][j]
        assert top["number"][row].tolist() == order.tolist()
        assert torch.equal(top["value"][j], best[order])
        assert top["position"][j].tolist() == at[order].tolist()
        assert torch.allclose(top["rows"][j].float(), case.features[order, :, j], atol=2e-3)
        assert torch.equal(top["ids"][row], case.ids[order])
        assert torch.equal(top["valid"][row], case.valid[order])
    assert (top["context"][23] == -1).all()


def test_every_token_shown_has_its_text(case: Case) -> None:
    tokens = case.analysis.top_tokens["tokens"]
    shown = {str(i) for i in case.analysis.top_contexts["ids"].unique().tolist()}
    assert shown == set(tokens) and all(isinstance(text, str) for text in tokens.values())


# ------------------------------------------------------------------------ files, wide, empty


def test_files_read_back_as_they_were_written(case: Case, tmp_path: Path) -> None:
    case.analysis.write(tmp_path)
    again = Analysis.read(tmp_path)
    for name in ("redundancy", "specialization", "top_tokens"):
        assert getattr(again, name) == getattr(case.analysis, name)
    for name in ("top_contexts", "correlation"):
        mine, theirs = getattr(case.analysis, name), getattr(again, name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k].nan_to_num(), theirs[k].nan_to_num()) for k in mine)


def test_the_headline_is_flat(case: Case) -> None:
    headline = case.analysis.headline
    assert headline["analysis/redundant_share"] == pytest.approx(1 / 23)
    assert all(v is None or isinstance(v, (int, float)) for v in headline.values())


def test_the_sparse_way_finds_the_same(
    case: Case, tiny_gpt2: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcsae.measure.analysis_pass, "DENSE_ENTRIES", 0)
    other = run_analysis(tiny_gpt2, texts, planted()).analysis
    assert other.redundancy["method"] == "sparse"
    for kind in ("redundant", "twins"):
        (mine,), (theirs,) = (a.redundancy[kind]["examples"] for a in (case.analysis, other))
        assert mine["features"] == theirs["features"] and mine["lag"] == theirs["lag"]
        assert mine["correlation"] == pytest.approx(theirs["correlation"], abs=1e-5)
    rank = case.analysis.redundancy["effective_rank"]
    assert other.redundancy["effective_rank"] == pytest.approx(rank, rel=1e-5)


def test_a_very_wide_sae_is_looked_at_over_fewer_lags(
    tiny_gpt2: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcsae.measure.analysis_pass, "DENSE_ENTRIES", 0)
    monkeypatch.setattr(tcsae.measure.analysis_pass, "SPARSE_ENTRIES", 3 * F**2)
    told = run_analysis(tiny_gpt2, texts, planted()).analysis.redundancy
    assert told["max_lag"] == 1 and told["redundant"]["n_pairs"] == 0
    assert told["max_lag_reason"] == "24 features: fewer lags than 4 looked at"


@pytest.mark.parametrize("dense", [True, False])
def test_a_wide_sae_shows_its_strongest_features_and_says_so(
    case: Case, tiny_gpt2: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, dense: bool
) -> None:
    monkeypatch.setattr(tcsae.measure.analysis_pass, "CLOSE_FEATURES", 10)
    if not dense:
        monkeypatch.setattr(tcsae.measure.analysis_pass, "DENSE_ENTRIES", 0)
    other = run_analysis(tiny_gpt2, texts, planted()).analysis
    energy = torch.tensor([e or 0 for e in case.analysis.specialization["features"]["energy"]])
    strongest = sorted(energy.argsort(descending=True)[:10].tolist())
    assert other.top_contexts["features"].tolist() == strongest
    assert other.top_contexts["rows"].shape == (10, 8, T)
    peaks = case.features[..., strongest].amax((0, 1))
    assert torch.equal(other.top_contexts["value"][:, 0], peaks)
    assert set(other.correlation["order"].tolist()) <= set(strongest)
    reason = "of 24 features the 10 with the most energy are shown"
    assert other.top_tokens["features_reason"] == reason
    assert other.specialization["summary"]["features_reason"] == reason
    assert other.redundancy["effective_rank"] is None
    assert other.redundancy["effective_rank_reason"] == reason
    assert other.redundancy["redundant"]["groups"] == [[0, 1]]
    cluster = other.specialization["features"]["cluster"]
    assert all(cluster[j] == -1 for j in range(F) if j not in strongest)
    assert [e["features"] for e in other.redundancy["twins"]["examples"]] == [[2, 3]]


def assert_writes(analysis: Analysis, folder: Path) -> dict[str, Any]:
    analysis.write(folder)
    return {p.name: json.loads(p.read_text()) for p in folder.glob("*.json")}


def test_an_sae_with_every_feature_dead_gets_words(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    case = run_analysis(tiny_gpt2, texts, torch.zeros(N, T, F))
    told = assert_writes(case.analysis, tmp_path)
    redundancy = told["redundancy.json"]
    assert redundancy["effective_rank_reason"] == "no feature varies over the valid tokens"
    assert redundancy["redundant"]["redundant_share_reason"] == "no feature fired"
    assert redundancy["position_correlation"] == []
    assert "explained by position" in redundancy["position_correlation_reason"]
    summary = told["specialization.json"]["summary"]
    assert summary["modularity"] is None and "at least 20 times" in summary["modularity_reason"]
    assert case.analysis.correlation["mean"].shape == (0, 0)
    assert case.analysis.top_contexts["ids"].shape == (0, T)


def test_one_context_gets_words(tiny_gpt2: Path, texts: Path, tmp_path: Path) -> None:
    case = run_analysis(tiny_gpt2, texts, planted(1))
    told = assert_writes(case.analysis, tmp_path)
    assert told["redundancy.json"]["position_correlation"] == []
    assert told["specialization.json"]["summary"]["ari_halves"] is None
    assert (case.analysis.top_contexts["context"][:, 1:] == -1).all()


def test_a_stop_is_obeyed(tiny_gpt2: Path, texts: Path) -> None:
    stop = StopRequest()
    stop.handle(signal.SIGTERM, None)
    with pytest.raises(Interrupted):
        run_analysis(tiny_gpt2, texts, planted(), stop=stop)
