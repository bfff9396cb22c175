"""What a run's features do together: redundancy, families, top contexts. Fills <run>/analysis/.

    redundancy.json           near-copies, position twins, effective rank
    specialization.json       clusters, their checks, and columns over features for map and table
    top_contexts.safetensors  where features fire strongest, activation by activation
    top_contexts.json         the tokens of those contexts as text
    correlation.safetensors   the picture of the correlation matrix, pairs, position by position

Shapes: F = d_sae features; S features looked at closely (`features`, ascending: all of them up to
CLOSE_FEATURES, else the live ones with the most energy c0); T positions; k contexts per feature;
C contexts that are among somebody's k; L of the S features that vary; M cells of the picture; P
pairs; Q twins; J position-bound features. Nothing is NaN in JSON: null, with `<name>_reason`.

redundancy.json:
    n_documents (the unit of every split, permutation and null),
    max_lag (max_lag_reason: why it is less than asked for), method ("dense", or "sparse" for wide
    SAEs: `top_k` partners per feature), thresholds {correlation, cosine, twin_correlation,
    twin_overlap},
    redundant   `redundancy_report`: n_live, n_pairs, n_groups, group_sizes, n_redundant,
                redundant_share, groups [[feature...]] and examples
                [{features: [i, j], correlation, cosine, lag}] (the 20 largest and strongest)
    twins       `twins_report`: n_pairs, n_features, n_candidates, n_cannot_tell, twinned_share,
                twinned_share_reason (if null), examples (as above)
    effective_rank, effective_rank_reason (if null), effective_rank_features (the most it can be:
                those that vary in both halves of the documents),
    position_correlation [{feature, omega_squared, toeplitz_share, toeplitz_share_reason (if null),
                diagonal_means [T]}], the J features most bound to positions, of those whose omega^2
                is above its noise; position_correlation_reason if the list is empty
specialization.json:
    summary     `Specialization.summary` (n_documents, n_clusters, cluster_sizes, modularity, ...;
                with fewer than 16 documents modularity_excess, significant and ari_halves are null)
    clusters    [{cluster, name, size, tokens [{text, score}], features [the 8 with most energy],
                density, rho_1, tau_int, omega_squared}] by decreasing size; the last four are
                medians over the cluster
    features    columns, a list of length F each: cluster, decoder_cluster (-1: none), x, y (null:
                no place on the map), log_density, rho_1, tau_int, omega_squared, run_length,
                token_entropy, amplitude_cv, energy (c0), live, top_tokens ([text...], up to 5,
                those that set the feature apart; [] for a dead one)
top_contexts.safetensors:
    features [S] int64; context [S, k] int64, rows of `ids` (-1: fewer than k); position [S, k]
    int16 of the maximum; value [S, k] float32 there; rows [S, k, T] float16, activations over the
    context, 0 at positions that do not count; ids [C, T] int32; valid [C, T] bool; number [C]
    int64, which held-out context it is
top_contexts.json:
    k, tokens {"token id": text of it alone}, parts {"token id": hex digits of the bytes} of those
    that are part of a character (older files have none); features_reason if S < F, else null
logit_lens.safetensors (not in older folders, nor of a synthetic world):
    features [R] int64; raised, lowered [R, k] int32, ids of the tokens whose logits a feature
    raises and lowers most; raised_by, lowered_by [R, k] float32 (measure/logit_lens.py)
document.safetensors (not in older folders):
    one held-out document as it stands, contexts one after the other, each with its BOS: ids [P]
    int32, valid [P] bool, n_contexts; at, feature [n] int32 and value [n] float16: what fires at
    its valid places
correlation.safetensors:
    order [L] int64, features in the order of the picture: by cluster (the unclustered last), in a
    cluster those alike side by side; edges [M + 1] int64: cell m is order[edges[m]:edges[m + 1]];
    mean, largest [M, M] float32: zero-lag Pearson coefficients of the two cells' pairs, a feature
    with itself left out (NaN in a cell of one feature with itself); cell_cluster [M] int64;
    pairs [P, 2] int64 with pair_correlation, pair_cosine [P] float32, pair_lag [P] int16 (the
    second lags the first); twins [Q, 2] int64 with twin_correlation, twin_cosine [Q];
    position_features [J] int64; position_correlation [J, T, T] float32, NaN where undefined;
    together_feature [S] int64, together [S, k] int64 the features that each fires with, most
    correlated first, -1: none, together_correlation [S, k] float32 (older files have none)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcsae.base.apart import Calls, here
from tcsae.base.files import load_tensors, make_folder, read_json, save_tensors, write_json
from tcsae.base.json_numbers import plain
from tcsae.base.progress import Progress
from tcsae.base.run_files import AnalysisFiles
from tcsae.base.signals import StopRequest
from tcsae.base.stages import stage
from tcsae.config import Measured
from tcsae.data.activation_model import ActivationModel
from tcsae.data.batches import ActivationBatches
from tcsae.data.token_text import TokenTexts
from tcsae.measure.analysis_pass import LONGEST_POSITIONS, MIN_FIRINGS, Pass, picture, together
from tcsae.measure.evaluation import held_out_units
from tcsae.measure.logit_lens import MOST_FEATURES, logit_lens
from tcsae.measure.text_features import coded
from tcsae.metrics.correlation import FeatureCorrelation
from tcsae.metrics.redundancy import (
    FeaturePairs,
    diagonal_means,
    effective_rank,
    position_twins,
    redundancy_report,
    redundant_pairs,
    toeplitz_share,
    twins_report,
)
from tcsae.metrics.specialization import Specialization, cluster_features, layout
from tcsae.metrics.top_contexts import (
    Firings,
    TokenStatistics,
    characteristic_tokens,
    cluster_names,
)
from tcsae.metrics.twins import PositionTwins
from tcsae.metrics.units import MIN_UNITS, Units
from tcsae.sae.base import SparseAutoencoder

log = logging.getLogger(__name__)

ENCODE_CONTEXTS = 32
THRESHOLDS = {"correlation": 0.9, "cosine": 0.7, "twin_correlation": 0.3, "twin_overlap": 0.3}
PARTNERS = 32
DIGITS = 6
"""What float32 carries."""
WORTH_A_PROCESS = 300_000
"""Firings from which on their clusters take longer than a process to start (three seconds)."""

_CANNOT_TELL_DISTANCE = "cannot tell: the entries vary no more than noise"
_DESCRIPTORS = ("rho_1", "tau_int", "omega_squared", "run_length", "amplitude_cv")
_OF_TOKENS = ("ids", "raised", "lowered")
_CLUSTER_MEDIANS = ("density", "rho_1", "tau_int", "omega_squared")


@dataclass(frozen=True)
class Analysis:
    """What a run's analysis/ folder holds (formats at the top of this file)."""

    redundancy: dict[str, Any]
    specialization: dict[str, Any]
    top_contexts: dict[str, Tensor]
    top_tokens: dict[str, Any]
    correlation: dict[str, Tensor]
    document: dict[str, Tensor] = field(default_factory=dict)
    """Of an analysis of an older version, and where contexts have no passage: {}."""
    logit_lens: dict[str, Tensor] = field(default_factory=dict)
    """{}: as `document`, and where there is no language model."""

    def write(self, folder: Path) -> None:
        files = AnalysisFiles(make_folder(folder))
        save_tensors(files.top_contexts, self.top_contexts, {})
        save_tensors(files.correlation, self.correlation, {})
        for file, tensors in (
            (files.document, self.document),
            (files.logit_lens, self.logit_lens),
        ):
            file.unlink(missing_ok=True)  # of an earlier analysis
            if tensors:
                save_tensors(file, tensors, {})
        write_json(files.top_tokens, self.top_tokens)
        write_json(files.redundancy, self.redundancy)
        write_json(files.specialization, self.specialization)

    @classmethod
    def read(cls, folder: Path) -> Analysis:
        """Raises UserError for a damaged file, FileNotFoundError for one that is not there."""
        files = AnalysisFiles(folder)
        advice = "run its command again with rerun=true"
        return cls(
            redundancy=read_json(files.redundancy),
            specialization=read_json(files.specialization),
            top_contexts=load_tensors(files.top_contexts, advice)[0],
            top_tokens=read_json(files.top_tokens),
            correlation=load_tensors(files.correlation, advice)[0],
            document=load_tensors(files.document, advice)[0] if files.document.is_file() else {},
            logit_lens=(
                load_tensors(files.logit_lens, advice)[0] if files.logit_lens.is_file() else {}
            ),
        )

    @property
    def headline(self) -> dict[str, Any]:
        """Flat names and values of what people look at first; None where there is no value."""
        summary = self.specialization["summary"]
        shown = ("n_clusters", "modularity", "modularity_excess", "ari_seeds", "ari_halves")
        return {
            "analysis/redundant_share": self.redundancy["redundant"]["redundant_share"],
            "analysis/twinned_share": self.redundancy["twins"]["twinned_share"],
            "analysis/effective_rank": self.redundancy["effective_rank"],
            **{f"analysis/{name}": summary[name] for name in (*shown, "ami_decoder")},
        }


@torch.inference_mode()
def analyse(
    sae: SparseAutoencoder,
    config: Measured,
    model: ActivationModel,
    batches: ActivationBatches,
    per_feature: Mapping[str, Tensor],
    stop: StopRequest,
    max_lag: int = 8,
    passage: ActivationBatches | None = None,
    calls: Calls = here,
) -> Analysis:
    """Everything in analysis/, in one pass over the held-out contexts.

    Args:
        sae: as saved, on raw activations.
        per_feature: `Evaluation.per_feature` of the same contexts: c0, density, omega_squared,
            profile_rate and the descriptors of the map.
        max_lag: largest lag at which redundant features are looked for.
        passage: contexts of one document as it stands, to be shown; None: there is none.
        calls: makes the calls that hold Python's lock; here, or in a process apart.

    Raises:
        Interrupted: a signal came.
    """
    sae = sae.to(batches.device).eval()
    known = {name: value.cpu() for name, value in per_feature.items()}
    size = config.dataset.context_size
    units = held_out_units(batches)
    lags, vocabulary = min(max_lag, size - 1), model.vocabulary
    seen = Pass(sae.d_sae, size, len(batches), vocabulary, batches.device, known, lags, units)
    with stage("analyse features"), Progress("analyse features", len(batches) * size) as progress:
        for batch in batches.in_order(ENCODE_CONTEXTS):
            stop.check()
            features = sae.encode(batch.x.float(), segments=batch.segments, valid=batch.valid)
            seen.update(features, model.shown(batch.ids), batch.segments, batch.valid)
            progress.update(batch.valid.numel())
    stop.check()
    W_dec = sae.W_dec.detach().cpu().float()
    correlated, redundancy = _redundancy(seen, W_dec, known)
    stop.check()
    log.info("clustering features, with the checks of the clusters")
    firings = seen.firings.compute()
    close = firings._replace(pattern=firings.pattern[:, seen.close.numpy()])
    calls = calls if close.pattern.nnz >= WORTH_A_PROCESS else here
    with stage("clusters"):
        found, places = calls(_clustered, close, W_dec[seen.close], units)
    stop.check()
    statistics = seen.tokens.compute()
    text = model.texts()
    contexts = _top_contexts(seen)
    document = {} if passage is None else _document(sae, passage)
    with stage("logit lens"):
        lens = logit_lens(W_dec, _brightest(seen, known["c0"]), model)
    shown = (contexts["ids"], *(t[n] for t in (document, lens) for n in _OF_TOKENS if n in t))
    ids = {int(i) for tensor in shown for i in tensor.unique()}
    return Analysis(
        redundancy=redundancy,
        specialization=_specialization(found, places, seen, statistics, known, text),
        top_contexts=contexts,
        top_tokens={
            "k": seen.top.k,
            **text.files(sorted(ids)),
            "features_reason": seen.left_out,
        },
        correlation=correlated | picture(seen, found.labels) | together(seen),
        document=document,
        logit_lens=lens,
    )


def _brightest(seen: Pass, c0: Tensor) -> Tensor:
    """Of the features looked at closely those with the most energy, ascending."""
    energy = c0[seen.close].nan_to_num()
    kept = energy.topk(min(MOST_FEATURES, len(energy))).indices
    return seen.close[kept].sort().values


def _clustered(
    close: Firings, W_dec: Tensor, units: Units
) -> tuple[Specialization, tuple[Tensor, Tensor]]:
    """The clusters, and the places of the map: one thread's work, whatever there are of cores."""
    found = cluster_features(close, W_dec, documents=units, min_firings=MIN_FIRINGS)
    return found, layout(found.graph)


def _document(sae: SparseAutoencoder, passage: ActivationBatches) -> dict[str, Tensor]:
    """document.safetensors."""
    rows = list(coded(sae, passage))
    ids, valid, _ = (torch.cat([row[i] for row in rows]) for i in range(3))
    codes = torch.cat([row[3] for row in rows]).coalesce()
    at, feature = codes.indices()
    value = codes.values().clamp(max=torch.finfo(torch.float16).max).half()
    kept = valid[at] & (value > 0)
    n_contexts = torch.tensor(len(rows))
    return {
        "ids": ids.int(),
        "valid": valid,
        "n_contexts": n_contexts,
        "at": at[kept].int(),
        "feature": feature[kept].int(),
        "value": value[kept],
    }


# -------------------------------------------------------------------------------- redundancy


@stage("redundancy")
def _redundancy(
    seen: Pass, W_dec: Tensor, known: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pairs as tensors, and redundancy.json."""
    coefficients: Tensor | Callable[[Tensor, Tensor], Tensor] = seen.zero_lag_SS
    partners: Tensor | None = None
    if isinstance(seen.lagged, FeatureCorrelation):
        values, lags = seen.lagged.compute()
        if seen.left_out:
            coefficients = seen.lagged.compute(max_lag=0).values
    else:
        partners, values, lags = seen.lagged.compute(PARTNERS)
        coefficients = seen.lagged.of_pairs
    pairs = redundant_pairs(
        values,
        W_dec,
        correlation_threshold=THRESHOLDS["correlation"],
        cosine_threshold=THRESHOLDS["cosine"],
        lags=lags,
        partners=partners,
    )
    twins = position_twins(
        coefficients,
        W_dec,
        known["profile_rate"],
        cosine_threshold=THRESHOLDS["cosine"],
        correlation_threshold=THRESHOLDS["twin_correlation"],
        overlap_threshold=THRESHOLDS["twin_overlap"],
        firings=seen.firings.compute(),
        documents=seen.units,
    )
    by_position, listed = _by_position(seen, known)
    report = {
        "n_documents": seen.units.n_documents,
        "max_lag": seen.max_lag,
        "max_lag_reason": seen.max_lag_reason,
        "method": "dense" if partners is None else "sparse",
        "top_k": None if partners is None else PARTNERS,
        "thresholds": THRESHOLDS,
        "redundant": redundancy_report(pairs, seen.live),
        "twins": twins_report(twins, seen.live),
        **_rank(seen),
        **listed,
    }
    return _pair_tensors("pair", pairs) | _pair_tensors("twin", twins) | by_position, report


def _pair_tensors(name: str, pairs: FeaturePairs | PositionTwins) -> dict[str, Tensor]:
    return {
        f"{name}s": torch.stack([pairs.first, pairs.second], dim=1),
        f"{name}_correlation": pairs.correlation.cpu().float(),
        f"{name}_cosine": pairs.cosine.float(),
        f"{name}_lag": pairs.lag,
    }


def _rank(seen: Pass) -> dict[str, Any]:
    reason = seen.left_out
    if reason is None and not seen.zero_lag_SS.diagonal().isfinite().any():
        reason = "no feature varies over the valid tokens"
    if reason is None and seen.units.n_documents < MIN_UNITS:
        reason = (
            "cannot tell what features share from noise: it takes two halves of at least "
            f"{MIN_UNITS} documents, and there are {seen.units.n_documents}"
        )
    rank, n_features = math.nan, 0
    if reason is None:
        halves = seen.zero_lag_halves()
        rank = effective_rank(seen.zero_lag_SS, halves)
        n_features = int(torch.stack([r.diagonal().isfinite() for r in halves]).all(dim=0).sum())
    found: dict[str, Any] = {"effective_rank": rank, "effective_rank_reason": None}
    if not math.isfinite(rank):
        reason = reason or "no feature varies in both halves of the documents"
        found = {"effective_rank": None, "effective_rank_reason": reason}
    return found | {"effective_rank_features": n_features if reason is None else None}


def _by_position(
    seen: Pass, known: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """T x T correlations of the most position-bound features, and their entry in the JSON."""
    features = seen.by_position.feature_ids
    if not len(features):
        square = torch.empty(0, seen.by_position.n_positions, seen.by_position.n_positions)
        reason = "no feature has a share of its variance explained by position above its noise"
        if seen.by_position.n_positions > LONGEST_POSITIONS:
            reason = f"not worked out for contexts of more than {LONGEST_POSITIONS} positions"
        empty = {"position_correlation": [], "position_correlation_reason": reason}
        return {"position_features": features, "position_correlation": square}, empty
    r_JTT = seen.by_position.compute()
    share_J, reason = torch.full((len(features),), math.nan), _CANNOT_TELL_DISTANCE
    if seen.units.n_documents < MIN_UNITS:
        reason = f"cannot tell: it takes {MIN_UNITS} documents"
    else:
        share_J = toeplitz_share(r_JTT, seen.by_position.compute_halves())
    columns = zip(features.tolist(), share_J, diagonal_means(r_JTT), strict=True)
    listed = [
        {
            "feature": j,
            "omega_squared": plain(known["omega_squared"][j], DIGITS),
            "toeplitz_share": plain(share, DIGITS),
            "toeplitz_share_reason": None if share.isfinite() else reason,
            "diagonal_means": plain(means, DIGITS),
        }
        for j, share, means in columns
    ]
    tensors = {"position_features": features, "position_correlation": r_JTT.float()}
    return tensors, {"position_correlation": listed, "position_correlation_reason": None}


# ---------------------------------------------------------------- top contexts, families, map


def _top_contexts(seen: Pass) -> dict[str, Tensor]:
    top = seen.top.compute()
    used, inverse = top.context.unique(return_inverse=True)
    # -1, where there are fewer than k contexts, sorts first if it is there at all.
    missing = int(len(used) > 0 and used[0] < 0)
    ids_CT, valid_CT = seen.contexts(used[missing:])
    return {
        "features": seen.close,
        "context": inverse - missing,
        "position": top.position.short(),
        "value": top.value.float(),
        "rows": top.rows.clamp(max=torch.finfo(torch.float16).max).half(),
        "ids": ids_CT,
        "valid": valid_CT,
        "number": used[missing:],
    }


def _specialization(
    found: Specialization,
    places: tuple[Tensor, Tensor],
    seen: Pass,
    statistics: TokenStatistics,
    known: Mapping[str, Tensor],
    text: TokenTexts,
) -> dict[str, Any]:
    """specialization.json."""
    F, close = seen.n_features, seen.close
    cluster, decoder_cluster = torch.full((F,), -1), torch.full((F,), -1)
    cluster[close], decoder_cluster[close] = found.labels, found.decoder_labels
    x_F, y_F = torch.full((2, F), torch.nan)
    placed, points = places
    x_F[close[placed]], y_F[close[placed]] = points[:, 0], points[:, 1]
    columns = {"x": x_F, "y": y_F, "energy": known["c0"], "log_density": statistics.log_density}
    columns |= {"token_entropy": statistics.token_entropy}
    columns |= {name: known[name] for name in _DESCRIPTORS}
    own = characteristic_tokens(statistics, torch.arange(F), 5)
    return {
        "summary": found.summary | {"features_reason": seen.left_out},
        "clusters": _clusters(cluster, statistics, known, text),
        "features": {
            "cluster": cluster.tolist(),
            "decoder_cluster": decoder_cluster.tolist(),
            "live": seen.live.tolist(),
            **{name: plain(column, DIGITS) for name, column in columns.items()},
            "top_tokens": [[text(token) for token, _ in tokens] for tokens in own],
        },
    }


def _clusters(
    labels: Tensor, statistics: TokenStatistics, known: Mapping[str, Tensor], text: TokenTexts
) -> list[dict[str, Any]]:
    names = cluster_names(statistics, labels, text)
    tokens = characteristic_tokens(statistics, labels)
    clusters = []
    for c, (name, best) in enumerate(zip(names, tokens, strict=True)):
        members = (labels == c).nonzero().flatten()
        strongest = members[known["c0"][members].argsort(descending=True, stable=True)]
        clusters.append(
            {
                "cluster": c,
                "name": name,
                "size": len(members),
                "tokens": [{"text": text(token), "score": plain(s, DIGITS)} for token, s in best],
                "features": strongest[:8].tolist(),
                **{m: plain(known[m][members].nanmedian(), DIGITS) for m in _CLUSTER_MEDIANS},
            }
        )
    return clusters
