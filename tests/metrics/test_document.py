from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcsae.metrics.autocorrelation import autocorrelation, window_consistency
from tcsae.metrics.document import LongLags, local_part, long_lags, nested_shares
from tcsae.metrics.position import position_dependence
from tcsae.metrics.units import Units
from tests.metrics import synthetic
from tests.metrics.synthetic import seeded, white_noise


def document_part(
    f: Tensor,
    bands: list[tuple[int, int]],
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    accumulator = LongLags(f.shape[2], f.shape[1], bands)
    accumulator.update(f, segments=segments, valid=valid)
    return accumulator.compute()


def by_hand(f: Tensor, segments: Tensor, valid: Tensor, first: int, last: int) -> Tensor:
    """D of one band, [F], pair by pair; products of means over pairs of different contexts."""
    n, t, n_features = f.shape
    x = torch.where(valid[..., None], f - f[valid].mean(0), 0.0)
    apart_NN = 1.0 - torch.eye(n).double()
    # Every context about the mean over the tokens of the others.
    counts = valid.sum(1)[:, None]
    others = (x.sum((0, 1)) - x.sum(1)) / (counts.sum() - counts).clamp(min=1)

    def mean_product(i: int, j: int) -> Tensor:
        both_NN = valid[:, i, None].double() * valid[:, j].double() * apart_NN
        pairs = both_NN.sum()
        found = torch.einsum("nm,nf,mf->f", both_NN, x[:, i], x[:, j])
        found -= torch.einsum("nm,nf,nf->f", both_NN, x[:, i], others)
        found -= torch.einsum("nm,mf,mf->f", both_NN, x[:, j], others)
        return found / pairs if pairs > 0 else found

    total, n_pairs = torch.zeros(n_features, dtype=f.dtype), 0
    energy, n_tokens = torch.zeros(n_features, dtype=f.dtype), 0
    for i in range(t):
        m = int(valid[:, i].sum())
        seen = valid[:, i]
        energy += (x[seen, i] * (x[seen, i] - 2 * others[seen])).sum(0) - m * mean_product(i, i)
        n_tokens += m
        for j in range(i + first, min(t, i + last + 1)):
            pair = valid[:, i] & valid[:, j] & (segments[:, i] == segments[:, j])
            m = int(pair.sum())
            if m:
                ends = x[pair, i] + x[pair, j]
                total += (x[pair, i] * x[pair, j] - ends * others[pair]).sum(0)
                total -= m * mean_product(i, j)
                n_pairs += m
    return (total / n_pairs) / (energy / n_tokens)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n_parts=st.integers(1, 9), offset=st.sampled_from([0, 1e3]))
def test_it_is_the_mean_over_all_pairs_in_any_batches(
    seed: int, n_parts: int, offset: float
) -> None:
    g = seeded(seed)
    f = synthetic.ar1(20, 16, 3, 0.9, g) + white_noise(20, 1, 3, generator=g) + offset
    segments, valid = synthetic.random_masks(20, 16, g, boundary=0.05)
    bands = [(2, 12), (5, 12)]
    split = LongLags(3, 16, bands)
    sizes = synthetic.random_splits(20, n_parts, g)
    parts = (x.split(sizes) for x in (f, segments, valid))
    for features, part_segments, mask in zip(*parts, strict=True):
        known = torch.where(mask[..., None], features, torch.nan)
        split.update(known, segments=part_segments, valid=mask)
    for index, (first, last) in enumerate(bands):
        expected = by_hand(f, segments, valid, first, last)
        assert torch.allclose(split.compute()[index], expected, atol=1e-6), (first, last)


def test_without_masks_it_is_the_mean_of_rho_over_the_lags_by_number_of_pairs() -> None:
    f = synthetic.ar1(30, 32, 4, 0.9, seeded()).float() + 5
    rho = autocorrelation(f.double(), 24)
    pairs = torch.arange(32, 7, -1)[8:, None].double()
    expected = (rho[8:] * pairs).sum(0) / pairs.sum()
    assert torch.allclose(document_part(f, [(8, 24)])[0], expected, atol=1e-5)


def ar1_document_part(phi: float, first: int, last: int, n_positions: int) -> float:
    lags = torch.arange(first, last + 1).double()
    pairs = n_positions - lags
    return float((pairs * phi**lags).sum() / pairs.sum())


def known_features(n_contexts: int, n: int, g: torch.Generator) -> dict[str, tuple[Tensor, float]]:
    """Features [n_contexts, 64, n] and their D from lag 32 on, W = 8."""
    constant = white_noise(n_contexts, 1, n, generator=g)
    noise = white_noise(n_contexts, 64, n, generator=g)
    return {
        "white": (noise, 0.0),
        "constant in a document .6": (0.6**0.5 * constant + 0.4**0.5 * noise, 0.6),
        "AR(1)": (
            synthetic.ar1(n_contexts, 64, n, 0.95, g),
            ar1_document_part(0.95, 32, 48, 64),
        ),
        "runs": (synthetic.markov_runs(n_contexts, 64, n, 0.9, 0.9, g), 0.0),
        "trend and constant": (
            0.3**0.5 * constant + 0.7**0.5 * noise + synthetic.position_trend(1, 64, 1),
            0.3,
        ),
    }


@pytest.mark.parametrize("n_contexts", [16, 64, 256])
def test_document_part_is_right_at_any_number_of_contexts(n_contexts: int) -> None:
    n = 100
    for name, (f, truth) in known_features(n_contexts, n, seeded(n_contexts)).items():
        document_F = document_part(f, [long_lags(8, 64)])[0]
        # The pooled ratio of the suite: weights by energy.
        energy_F = f.var(0).mean(0)
        found = (document_F * energy_F).sum() / energy_F.sum()
        noise = document_F.std() / n**0.5
        assert abs(found - truth) < 4 * noise + 0.002, (name, float(found), float(noise))


@pytest.mark.parametrize("n_contexts", [16, 64])
def test_packed_documents_do_not_pull_it_down(n_contexts: int) -> None:
    """Each half of the pairs lies in another document than the other: the plain ratio loses
    D (1 - p) / N, .02 at 16 contexts."""
    g, n = seeded(n_contexts), 500
    segments = (torch.rand(n_contexts, 48, generator=g) < 0.03).long().cumsum(1)
    level = white_noise(n_contexts, 48, n, generator=g)
    level = level.gather(1, segments[..., None].expand(-1, -1, n))
    f = 0.6**0.5 * level + 0.4**0.5 * white_noise(n_contexts, 48, n, generator=g)
    document_F = document_part(f, [(8, 36)], segments)[0]
    energy_F = f.var(0).mean(0)
    found = (document_F * energy_F).sum() / energy_F.sum()
    assert abs(found - 0.6) < 4 * document_F.std() / n**0.5 + 0.003


def test_values_at_invalid_positions_change_nothing() -> None:
    g = seeded(2)
    f = synthetic.ar1(20, 16, 2, 0.9, g)
    segments, valid = synthetic.random_masks(20, 16, g, boundary=0.03)
    found = [
        document_part(torch.where(valid[..., None], f, garbage), [(4, 12)], segments, valid)
        for garbage in (0.0, 1e6, torch.nan)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_says_nothing_is_nan() -> None:
    f = torch.full((20, 16, 2), 0.3)
    f[..., 1] = torch.rand(20, 16, generator=seeded(3))
    document = document_part(f, [(4, 12)])[0]
    assert document.isnan().tolist() == [True, False], "a constant does not vary"
    assert document_part(f[:1], [(4, 12)]).isnan().all(), "a single context"
    short = (torch.arange(16) // 4).expand(20, 16)
    assert document_part(f, [(4, 12)], short).isnan().all(), "no pair in one segment"


def test_what_is_left_without_a_block_is_that_of_the_other_contexts() -> None:
    g = seeded(4)
    f = synthetic.ar1(24, 16, 3, 0.9, g) + white_noise(24, 1, 3, generator=g) + 3
    bands = [(2, 12), (4, 12)]
    accumulator = LongLags(3, 16, bands, n_blocks=8)
    accumulator.update(f[:16])
    accumulator.update(f[16:])
    left = accumulator.covariances()
    assert left.shape == (9, 2, 3)
    for block in range(8):
        kept = torch.arange(24) % 8 != block
        # The same blocks of the others, in their order.
        units = Units((torch.arange(24) % 8)[kept])
        others = LongLags(3, 16, bands, units=units)
        others.update(f[kept])
        assert torch.allclose(left[1 + block], others.covariances(deletions=False)[0], atol=1e-9)


def test_local_part_is_what_the_document_leaves() -> None:
    consistency, document = torch.tensor([0.5, 0.6, 1.0, 0.3]), torch.tensor([0.2, 0.6, 1.0, 0.0])
    found = local_part(consistency, document)
    assert torch.allclose(found[:2], torch.tensor([0.375, 0.0]))
    assert found[2].isnan() and found[3] == consistency[3]


@pytest.mark.parametrize("n_contexts", [64, 256])
def test_nested_shares_are_the_variance_components_features_were_made_of(n_contexts: int) -> None:
    """position + document + runs of exactly 8 tokens in phase with nothing + noise."""
    g, n, t = seeded(n_contexts), 120, 64
    trend = synthetic.position_trend(1, t, 1)
    trend = (trend - trend.mean()) / trend.std(unbiased=False)
    parts = (0.1, 0.2, 0.3, 0.4)
    memory = synthetic.ar1(n_contexts, t, n, 0.9, g)
    f = (
        parts[0] ** 0.5 * trend
        + parts[1] ** 0.5 * white_noise(n_contexts, 1, n, generator=g)
        + parts[2] ** 0.5 * memory
        + parts[3] ** 0.5 * white_noise(n_contexts, t, n, generator=g)
    )
    c8 = synthetic.ar1_window_consistency(0.9, 8)
    lasting = ar1_document_part(0.9, 32, 48, t)
    truth = (0.1, 0.2 + 0.3 * lasting, 0.3 * (c8 - lasting), 0.4 + 0.3 * (1 - c8))
    omega = position_dependence(f).omega_squared
    consistency = window_consistency(autocorrelation(f, 8), 8)
    shares = nested_shares(omega, document_part(f, [long_lags(8, t)])[0], consistency)
    assert torch.allclose(torch.stack(list(shares.values())).sum(0), torch.ones(n).double())
    for (name, value), wanted in zip(shares.items(), truth, strict=True):
        error = float(value.std()) / n**0.5
        assert abs(value.mean() - wanted) < 4 * error + 0.25 / n_contexts, (name, value.mean())


def test_nested_shares_agree_with_a_nested_analysis_of_variance() -> None:
    """Balanced: document constants, windows of 8 aligned, tokens. The window component of the
    classical analysis is the part that ends with its window."""
    g, n_contexts, n = seeded(9), 400, 40
    sizes = {"document": 0.3, "window": 0.3, "flicker": 0.4}
    window = white_noise(n_contexts, 8, n, generator=g).repeat_interleave(8, 1)
    f = (
        sizes["document"] ** 0.5 * white_noise(n_contexts, 1, n, generator=g)
        + sizes["window"] ** 0.5 * window
        + sizes["flicker"] ** 0.5 * white_noise(n_contexts, 64, n, generator=g)
    )
    cells = f.unflatten(1, (8, 8))
    flicker = cells.var(2).mean((0, 1))
    windows = cells.mean(2).var(1).mean(0) - flicker / 8
    documents = f.mean(1).var(0) - windows / 8 - flicker / 64
    total = flicker + windows + documents
    omega = position_dependence(f).omega_squared
    document = document_part(f, [long_lags(8, 64)])[0]
    # Aligned windows: the lag products within them are the analysis' own.
    d = (f - f.mean(0)).unflatten(1, (8, 8))
    pairs = (d.sum(2).square() - d.square().sum(2)).mean((0, 1)) / 56
    consistency = pairs / d.square().mean((0, 1, 2))
    shares = nested_shares(omega, document, consistency)
    assert abs((shares["share_document"] - documents / total).mean()) < 0.005
    assert abs((shares["share_window"] - windows / total).mean()) < 0.005
    assert abs((shares["share_flicker"] - flicker / total).mean()) < 0.005
    assert abs(shares["share_position"].mean()) < 0.001


def test_unknown_parts_leave_no_share() -> None:
    shares = nested_shares(
        torch.tensor([0.1, torch.nan]), torch.tensor([torch.nan, 0.2]), torch.tensor([0.3, 0.3])
    )
    assert all(value.isnan().all() for value in shares.values())


def test_bands_that_do_not_fit_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="bands of lags"):
        LongLags(3, 16, [(8, 16)])
