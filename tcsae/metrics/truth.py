"""An SAE against the true features: what only a synthetic world (tcsae/data/synthetic.py) can say.

Shapes: B contexts of a batch, T positions, F true features, N features of the SAE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FOUND_COSINE = 0.9
"""A true feature is found if the cosine with its match is above this."""
MEANS = ("cosine", "found", "precision", "recall", "f1")
"""Of each true feature; the others are of its runs."""
OF_RUNS = ("pieces", "broken", "missed", "delay", "lag")
_SUMS = ("on", "fired", "both", "runs", "hit", "pieces", "broken", "delay", "ends", "lag")


def match_features(
    W_dec: Tensor, decoder: Tensor, *, unsigned: bool = False
) -> tuple[Tensor, Tensor]:
    """One feature of the SAE for every true one, by the largest sum of decoder cosines (Hungarian).

    Args:
        W_dec: [N, d_in], of any norm; a zero row has cosine 0 with everything.
        decoder: [F, d_in].
        unsigned: by the size of the cosine, whatever its sign.

    Returns:
        [F] int64, the matched feature, -1 where the SAE has fewer features than there are; and
        the cosines [F] float64, 0 for those without a match.
    """
    from scipy.optimize import linear_sum_assignment

    learnt_ND, true_FD = (functional.normalize(w.double().cpu(), dim=-1) for w in (W_dec, decoder))
    cosine_FN = true_FD @ learnt_ND.T
    if unsigned:
        cosine_FN = cosine_FN.abs()
    rows, columns = linear_sum_assignment(cosine_FN.numpy(), maximize=True)
    match_F = torch.full((len(decoder),), -1)
    match_F[torch.from_numpy(rows)] = torch.from_numpy(columns)
    cosine_F = torch.zeros(len(decoder), dtype=torch.float64)
    cosine_F[torch.from_numpy(rows)] = cosine_FN[rows, columns]
    return match_F, cosine_F


def random_cosine(n: int, decoder: Tensor, seed: int = 0) -> float:
    """The mean matched cosine of `n` random directions: what chance finds among so many."""
    draws = torch.Generator().manual_seed(seed)
    rows_ND = torch.randn(n, decoder.shape[1], generator=draws, dtype=torch.float64)
    return float(match_features(rows_ND, decoder)[1].mean())


class TruthMetrics:
    """How an SAE's features fire against the true ones they are matched with, over any batches.

    A true run is a stretch of valid tokens of one document at which a true feature is on. For it
    are counted: whether its match fires in it at all (else it is `missed`), in how many pieces
    (`pieces`, of runs that are hit: flicker; `broken`: the share in more than one), how many tokens
    late it begins (`delay`), and for how many tokens the match stays on after the end (`lag`; over
    runs that end inside their document and whose last token is hit). `pieces` is at best 1, the
    others 0.

    Args:
        W_dec: [N, d_in], the SAE's.
        decoder: [F, d_in], the truth's.
        class_of: [F] index into `class_names`.
        class_names: of the lifetimes.
        slow: those of them whose runs last.
        parent: [F]; -1 for a feature without one.
    """

    def __init__(
        self,
        W_dec: Tensor,
        decoder: Tensor,
        *,
        class_of: Tensor,
        class_names: Sequence[str],
        slow: Sequence[str],
        parent: Tensor,
    ) -> None:
        self.match, self.cosine = match_features(W_dec, decoder)
        self.random_cosine = random_cosine(len(W_dec), decoder)
        self._class_of, self._names, self._slow = class_of, tuple(class_names), tuple(slow)
        child = parent >= 0
        # [F, C]: which features the children, one a column, are of.
        self._children = functional.one_hot(parent[child], len(decoder)).T.float()
        self._is_child = child
        self._sums = {name: torch.zeros(len(decoder), dtype=torch.int64) for name in _SUMS}
        self._beside = torch.zeros(2, len(decoder), dtype=torch.int64)
        self.n_tokens = 0

    @torch.no_grad()
    def update(self, features: Tensor, truth: Tensor, *, segments: Tensor, valid: Tensor) -> None:
        """Add a batch: features [B, T, N] of the SAE, truth [B, T, F], segments, valid [B, T]."""
        valid_BT1 = valid.cpu()[..., None]
        on_BTF = (truth.cpu() > 0) & valid_BT1
        fired_BTF = (features.cpu() > 0)[..., self.match.clamp(min=0)]
        fired_BTF &= valid_BT1 & (self.match >= 0)
        both_BTF = on_BTF & fired_BTF
        self.n_tokens += int(valid.sum())
        for name, value in (("on", on_BTF), ("fired", fired_BTF), ("both", both_BTF)):
            self._sums[name] += value.sum((0, 1))
        if self._is_child.any():
            child_BTF = (on_BTF[..., self._is_child].float() @ self._children.T) > 0
            for row, value in enumerate((on_BTF & child_BTF, both_BTF & child_BTF)):
                self._beside[row] += value.sum((0, 1))
        self._follow(on_BTF, fired_BTF, _goes_on(segments.cpu(), valid.cpu()))

    def _follow(self, on_BTF: Tensor, fired_BTF: Tensor, goes_on_BT: Tensor) -> None:
        """Along the positions, with what is known of the run that each feature is in."""
        none_BF = torch.zeros_like(on_BTF[:, 0])
        was_on, had_fired, hit, broken, lags = (none_BF,) * 5
        late_BF = torch.zeros(none_BF.shape, dtype=torch.int64)
        for t in range(on_BTF.shape[1]):
            on, fired, goes_on_B1 = on_BTF[:, t], fired_BTF[:, t], goes_on_BT[:, t, None]
            inside = on & was_on & goes_on_B1  # a run that was there a token ago
            begins = on & ~inside
            hit, broken = hit & inside, broken & inside
            piece = on & fired & ~(inside & had_fired)
            ends = was_on & had_fired & goes_on_B1 & ~on
            lags = (ends | (lags & goes_on_B1)) & fired & ~on
            late_BF = torch.where(inside, late_BF + 1, 0)
            counted = {
                "runs": begins,
                "hit": piece & ~hit,
                "pieces": piece,
                "broken": piece & hit & ~broken,
                "delay": torch.where(piece & ~hit, late_BF, 0),
                "ends": ends,
                "lag": lags,
            }
            for name, value in counted.items():
                self._sums[name] += value.sum(0)
            hit, broken = hit | piece, broken | (piece & hit)
            was_on, had_fired = on, fired

    def per_feature(self) -> dict[str, Tensor]:
        """[F] each: `match` int64; MEANS and OF_RUNS, `density` (share of tokens truly on) and
        `density_match` float64. NaN where nothing was there to be counted: a true feature that was
        never on has neither precision nor recall nor F1, one without a hit run no pieces. Without
        a match, recall and F1 are 0."""
        sums = {name: value.double() for name, value in self._sums.items()}
        seen_F = sums["on"] > 0
        f1_F = _ratio(2 * sums["both"], sums["on"] + sums["fired"])
        return {
            "match": self.match,
            "cosine": self.cosine,
            "found": (self.cosine > FOUND_COSINE).double(),
            "density": sums["on"] / max(self.n_tokens, 1),
            "density_match": sums["fired"] / max(self.n_tokens, 1),
            "precision": _ratio(sums["both"], sums["fired"]).where(seen_F, math.nan),
            "recall": _ratio(sums["both"], sums["on"]),
            "f1": f1_F.where(seen_F, math.nan),
            "pieces": _ratio(sums["pieces"], sums["hit"]),
            "broken": _ratio(sums["broken"], sums["hit"]),
            "missed": 1 - _ratio(sums["hit"], sums["runs"]),
            "delay": _ratio(sums["delay"], sums["hit"]),
            "lag": _ratio(sums["lag"], sums["ends"]),
        }

    def compute(self) -> dict[str, Any]:
        """Plain numbers, NaN where there is none:

        - `n_true`, `n_features`; `mcc`, the mean matched cosine over all true features, and
          `mcc_random`, that of as many random directions
        - `all`, `slow` (if there are slow classes) and `by_class` {name}: each {`n`, `n_found`, and
          means over its features of MEANS and OF_RUNS}
        - `absorption` (if there are children): {`recall_with_child`, `recall_without_child`} of the
          parents, over all their tokens with, and without, one of their children
        """
        columns = self.per_feature()
        class_of = self._class_of
        slow_F = torch.isin(class_of, torch.tensor([self._names.index(n) for n in self._slow]))
        found: dict[str, Any] = {
            "n_true": len(self.match),
            "n_features_matched": int((self.match >= 0).sum()),
            "mcc": float(self.cosine.mean()),
            "mcc_random": self.random_cosine,
            "all": _means(columns, torch.ones_like(slow_F)),
            "by_class": {n: _means(columns, class_of == i) for i, n in enumerate(self._names)},
        }
        if slow_F.any():
            found["slow"] = _means(columns, slow_F)
        if self._is_child.any():
            parents_F = self._children.any(1)
            on, both = (self._sums[name][parents_F].sum() for name in ("on", "both"))
            beside, hit_beside = self._beside[:, parents_F].sum(1)
            found["absorption"] = {
                "recall_with_child": float(_ratio(hit_beside.double(), beside.double())),
                "recall_without_child": float(
                    _ratio((both - hit_beside).double(), (on - beside).double())
                ),
            }
        return found


def _goes_on(segments_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """[B, T] whether a token and the one before it are valid and of one document."""
    goes_on_BT = torch.zeros_like(valid_BT)
    same_BT = segments_BT[:, 1:] == segments_BT[:, :-1]
    goes_on_BT[:, 1:] = same_BT & valid_BT[:, 1:] & valid_BT[:, :-1]
    return goes_on_BT


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """NaN where nothing is below."""
    return above / below.where(below > 0, math.nan)


def _means(columns: Mapping[str, Tensor], members_F: Tensor) -> dict[str, float]:
    means = {name: float(columns[name][members_F].nanmean()) for name in (*MEANS, *OF_RUNS)}
    n_found = int(columns["found"][members_F].sum())
    return {"n": int(members_F.sum()), "n_found": n_found, **means}


SHOWN_SLOW = ("found", "f1", "pieces", "lag")
"""What is looked at first of the slow features."""


def flat_truth(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of a summary by one name each, as tables and W&B have them: `truth_mcc`;
    `truth_found` of all, `truth_found_slow`, `truth_found_<class>`, and so for every mean;
    `truth_recall_with_child`."""
    found = {"truth_mcc": summary["mcc"]}
    parts = {"": summary["all"], **({"_slow": summary["slow"]} if "slow" in summary else {})}
    parts |= {f"_{name}": part for name, part in summary["by_class"].items()}
    for name in (*MEANS, *OF_RUNS):
        found |= {f"truth_{name}{of}": part[name] for of, part in parts.items()}
    return found | {f"truth_{k}": v for k, v in summary.get("absorption", {}).items()}
