"""The features of a run as its page's script needs them: columns over all of them, and parts.

The columns (`index`) come with the page: numbers to sort and search by, tokens and clusters. What
is shown of a feature that is opened (curves, contexts, neighbours, the document) comes in parts of
neighbouring numbers (`part`), and the words of the contexts, to be searched, by themselves
(`words`). Numbers are packed as `page.packed` does.

Shapes: F = d_sae features, R of a part, K lags, T positions, S features with top contexts, k of
those each, C contexts shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tcsae.base.json_numbers import plain
from tcsae.base.labels import label
from tcsae.data.token_text import Piece, pieces
from tcsae.report.contents import NO_ANALYSIS, Contents, binned
from tcsae.report.neighbours import nearest, together
from tcsae.report.page import packed
from tcsae.report.passage import Passage

MAX_ACTIVATIONS = 2_000_000
"""Activations in the top contexts of a part, 3 bytes each; beyond, fewer contexts a feature."""
MAX_PAIRS = 4096
"""Redundant pairs, and position twins, of a part."""
MISSING = -32768
DIGITS = 4
"""Of a number in a list."""
AROUND = 24
"""Tokens on either side of a context's peak that are shown at first, and searched."""

_COLUMNS = (
    "density",
    "rho_1",
    "tau_int",
    "run_length",
    "persistence",
    "omega_squared",
    "mutual_information_share",
    "layout_share",
    "token_entropy",
    "amplitude_cv",
    "mean_activation",
    "c0",
    "max_decoder_cosine_sim",
)
_SHORT = {
    "mutual_information_share": "pos. info",
    "omega_squared": "omega²",
    "layout_share": "layout",
    "token_entropy": "token entropy",
    "amplitude_cv": "amplitude CV",
    "mean_activation": "mean act.",
    "c0": "energy",
    "max_decoder_cosine_sim": "nearest cos",
    "run_length": "run length",
}


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """The features of a run, in the page's form."""

    contents: Contents

    @property
    def n_features(self) -> int:
        return len(self.contents.live)

    # ------------------------------------------------------------------ all of them

    def index(self) -> dict[str, Any]:
        """Columns over all features, [F] each, and what holds for all of them."""
        contents = self.contents
        specialization = contents.analysis and contents.analysis.specialization
        clusters = specialization["clusters"] if specialization else []
        values = self._scalars()
        text = [("id", "Feature", "number in the dictionary")]
        if specialization:
            text += [
                ("tokens", "Tokens", "that set the feature apart, best first"),
                ("cluster", "Cluster", "of features that fire together"),
            ]
        shown = [{"key": k, "name": n, "meaning": m, "text": True} for k, n, m in text]
        for name in values:
            said = {"name": _SHORT.get(name, name), "meaning": label(name).meaning}
            shown.append({"key": name, **said})
        window = contents.window_metric
        columns = specialization["features"] if specialization else {}
        cluster = columns.get("cluster", [-1] * self.n_features)
        return {
            "n": self.n_features,
            "live": packed(contents.live.astype(np.uint8)),
            "columns": shown,
            "first_sort": window if window in values else "density",
            "values": {name: packed(column, "float24") for name, column in values.items()},
            "tokens": _texts(columns.get("top_tokens", [[]] * self.n_features)),
            "cluster": packed(np.array(cluster, dtype=np.int32)),
            "cluster_names": [c["name"] for c in clusters],
            "positions": self._profile[0],
            "around": AROUND,
            "top_reason": self._top_reason(),
        }

    def _scalars(self) -> dict[str, np.ndarray]:
        """Columns of numbers, those there are, [F] each; NaN where there is no value."""
        contents = self.contents
        rows = contents.run.core["eval_result_details"]
        found: dict[str, Any] = dict(contents.values)
        found["max_decoder_cosine_sim"] = [row["max_decoder_cosine_sim"] for row in rows]
        if contents.analysis is not None:
            columns = contents.analysis.specialization["features"]
            found["token_entropy"] = columns["token_entropy"]
        names = [name for name in (*contents.memory_metrics, *_COLUMNS) if name in found]
        return {name: np.array(found[name], dtype=np.float32) for name in names}

    def _top_reason(self) -> str:
        """Why a feature has no top contexts."""
        analysis = self.contents.analysis
        if analysis is None:
            return f"Top contexts: {NO_ANALYSIS}."
        return analysis.top_tokens["features_reason"] or "It never fired on held-out text."

    # ------------------------------------------------------------------ some of them

    def part(self, first: int, stop: int) -> dict[str, Any]:
        """What is shown of the features from `first` on, before `stop`, when they are opened."""
        ids = np.arange(first, stop)
        number_F, cosine_F = self._nearest
        passage = self._passage
        return {
            "first": first,
            "curves": self._curves(first, stop),
            "nearest": packed(number_F[first:stop]),
            "cosine": packed(cosine_F[first:stop], "float24"),
            "together": [self._together.get(i, []) for i in ids.tolist()],
            "pairs": self._pairs(first, stop),
            "lens": self._lens(first, stop),
            "top": self._top(first, stop),
            "document": None if passage is None else passage.marks(ids),
        }

    @cached_property
    def _passage(self) -> Passage | None:
        return Passage.of(self.contents.analysis)

    @cached_property
    def _nearest(self) -> tuple[np.ndarray, np.ndarray]:
        # F^2 products: of 65,536 features only for those that there is more to be seen of.
        analysis = self.contents.analysis
        close = None if analysis is None else analysis.top_contexts["features"]
        return nearest(self.contents.run.sae.W_dec, close)

    @cached_property
    def _together(self) -> dict[int, list[list[float]]]:
        return together(self.contents.analysis)

    @cached_property
    def _profile(self) -> tuple[np.ndarray, np.ndarray]:
        return binned(self.contents.values["profile_rate"])

    def _curves(self, first: int, stop: int) -> dict[str, Any]:
        """rho in ten thousandths, firing rate in 255ths of the feature's largest."""
        rho_RK = self.contents.values["rho"][:, first:stop].T
        coded = np.where(np.isfinite(rho_RK), np.nan_to_num(rho_RK) * 10000, MISSING).round()
        rate_RT = np.nan_to_num(self._profile[1][:, first:stop].T)
        top_R = rate_RT.max(axis=1, initial=0.0)
        levels = rate_RT / np.where(top_R > 0, top_R, 1.0)[:, None]
        return {
            "rho": packed(coded.clip(-32768, 32767).astype(np.int16)) | {"missing": MISSING},
            "rate": packed((levels * 255).round().astype(np.uint8)) | {"missing": None},
            "rate_scale": plain(top_R, DIGITS),
        }

    def _pairs(self, first: int, stop: int) -> list[dict[str, Any]]:
        """Redundant pairs and twins with a feature of the part: rows of [first, second,
        correlation, cosine, lag]."""
        analysis = self.contents.analysis
        if analysis is None:
            return []
        tensors = analysis.correlation
        none = tensors["twins"].new_zeros(len(tensors["twins"]))
        kinds = (
            ("Redundant with", "pairs", "pair", tensors["pair_lag"]),
            ("Position twin of", "twins", "twin", none),
        )
        found = []
        for name, pairs, prefix, lag in kinds:
            own = ((tensors[pairs] >= first) & (tensors[pairs] < stop)).any(1)
            own = own.nonzero().flatten()[:MAX_PAIRS]
            columns = zip(
                tensors[pairs][own].tolist(),
                plain(tensors[f"{prefix}_correlation"][own], DIGITS),
                plain(tensors[f"{prefix}_cosine"][own], DIGITS),
                lag[own].tolist(),
                strict=True,
            )
            rows = [[i, j, r, cosine, k] for (i, j), r, cosine, k in columns]
            found.append({"name": name, "rows": rows})
        return found

    def _lens(self, first: int, stop: int) -> dict[str, Any] | None:
        """Tokens that a feature raises and lowers: numbers of `vocabulary` [R', k], `row` of R'."""
        analysis = self.contents.analysis
        if analysis is None or not analysis.logit_lens:
            return None
        tensors = {name: value.numpy() for name, value in analysis.logit_lens.items()}
        known, row = _rows(tensors["features"], first, stop)
        both = np.stack([tensors["raised"][known], tensors["lowered"][known]])
        used, inverse = np.unique(both, return_inverse=True)
        raised, lowered = inverse.reshape(both.shape).astype(np.int32)
        return {
            "row": row,
            "vocabulary": [analysis.top_tokens["tokens"][str(token)] for token in used.tolist()],
            "raised": packed(raised),
            "lowered": packed(lowered),
        }

    # ------------------------------------------------------------------ top contexts

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        assert self.contents.analysis is not None
        return {name: v.numpy() for name, v in self.contents.analysis.top_contexts.items()}

    @cached_property
    def _pieces(self) -> dict[int, list[Piece]]:
        """By context, where tokens make whole characters together."""
        analysis = self.contents.analysis
        assert analysis is not None
        texts = analysis.top_tokens["tokens"]
        # An analysis of an older version does not say which bytes its tokens have.
        known = analysis.top_tokens.get("parts", {})
        parts = {i: bytes.fromhex(part) for i, part in known.items()}
        ids_CT = self._tensors["ids"]
        is_part = np.isin(ids_CT, [int(i) for i in parts])
        found = {}
        for context in np.flatnonzero(is_part.any(axis=1)).tolist():
            own = [str(token) for token in ids_CT[context].tolist()]
            row = pieces([texts[i] for i in own], [parts.get(i) for i in own])
            found[context] = [piece for piece in row if piece.stop - piece.start > 1]
        return found

    def _top(self, first: int, stop: int) -> dict[str, Any] | None:
        """Top contexts: those used, each once as numbers of texts; activations sparse in 255ths.

        `row` [R] is the feature's of R' that have any; `joined` has rows of [context, start, stop,
        text], see `_pieces`; `count` [R', k] says how many of `at` (position) and `level` belong to
        each (feature, context).
        """
        if self.contents.analysis is None:
            return None
        known, row = _rows(self._tensors["features"], first, stop)
        per_feature = ("context", "position", "value", "rows")
        tensors = _fewer({name: self._tensors[name][known] for name in per_feature})
        rows_RkT = tensors["rows"].astype(np.float32)
        peak_R = tensors["value"].max(axis=1, initial=0.0)
        level_RkT = (rows_RkT / np.where(peak_R > 0, peak_R, 1.0)[:, None, None] * 255).round()
        # What fired, however weakly, is shown.
        level_RkT = np.where(rows_RkT > 0, level_RkT.clip(1, 255), 0).astype(np.uint8)
        chosen_C, context_Rk = _renumbered(tensors["context"])
        ids_CT = self._tensors["ids"][chosen_C]
        used, inverse = np.unique(ids_CT, return_inverse=True)
        texts = self.contents.analysis.top_tokens["tokens"]
        own = enumerate(chosen_C.tolist())
        return {
            "row": row,
            "vocabulary": [texts[str(token)] for token in used.tolist()],
            "joined": [[c, *piece] for c, known in own for piece in self._pieces.get(known, [])],
            "ids": packed(_narrow(inverse.reshape(ids_CT.shape))),
            "valid": packed(self._tensors["valid"][chosen_C].astype(np.uint8)),
            "numbers": self._tensors["number"][chosen_C],
            "context": packed(context_Rk),
            "position": packed(tensors["position"].astype(np.int32)),
            "value": packed(tensors["value"].astype(np.float32)),
            "count": packed((level_RkT > 0).sum(axis=2).astype(np.int32)),
            "at": packed(level_RkT.nonzero()[2].astype(np.uint16)),
            "level": packed(level_RkT[level_RkT > 0]),
        }

    def words(self) -> dict[str, Any] | None:
        """The text around every peak, to be searched without any part: numbers of `vocabulary`,
        whose first is nothing, [S, k, 2 AROUND + 1]. None where there is none."""
        if self.contents.analysis is None or not len(self._tensors["features"]):
            return None
        ids_CT, analysis = self._tensors["ids"], self.contents.analysis
        used, inverse = np.unique(ids_CT, return_inverse=True)
        texts = ["", *(analysis.top_tokens["tokens"][str(token)] for token in used.tolist())]
        number_CT = inverse.reshape(ids_CT.shape) + 1
        for row, joined in self._pieces.items():
            for piece in joined:
                number_CT[row, piece.start : piece.stop] = 0
                number_CT[row, piece.start] = len(texts)
                texts.append(piece.text)
        padded = np.pad(number_CT, ((0, 1), (AROUND, AROUND)))  # the last context: none
        around = self._tensors["position"].astype(np.int64)[..., None] + np.arange(2 * AROUND + 1)
        context = self._tensors["context"]
        found_SkA = padded[context[..., None], around]
        return {
            "features": packed(self._tensors["features"].astype(np.int32)),
            "vocabulary": texts,
            "ids": packed(_narrow(found_SkA)),
        }


def _texts(rows: list[list[str]]) -> dict[str, Any]:
    """Lists of texts: `count` [F] says how many numbers of `vocabulary` in `at` each has."""
    numbers: dict[str, int] = {}
    at = [numbers.setdefault(text, len(numbers)) for row in rows for text in row]
    return {
        "vocabulary": list(numbers),
        "count": packed(np.array([len(row) for row in rows], dtype=np.uint8)),
        "at": packed(_narrow(np.array(at, dtype=np.int64))),
    }


def _narrow(values: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 on in as few bytes as they take."""
    return values.astype(np.uint16 if values.max(initial=0) < 2**16 else np.int32)


def _rows(features: np.ndarray, first: int, stop: int) -> tuple[np.ndarray, list[int]]:
    """Rows of the ascending `features` that are in the part; and for each number of the part which
    of those rows is its, -1: none."""
    known = np.flatnonzero((features >= first) & (features < stop))
    row = np.full(stop - first, -1)
    row[features[known] - first] = np.arange(len(known))
    return known, row.tolist()


def _renumbered(context_Rk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The contexts used, and the same by their place among those; -1 (none) stays."""
    chosen = np.unique(context_Rk[context_Rk >= 0])
    place = np.searchsorted(chosen, context_Rk)
    return chosen, np.where(context_Rk < 0, -1, place).astype(np.int32)


def _fewer(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first few contexts of every feature: as many as MAX_ACTIVATIONS leaves room for."""
    totals = (tensors["rows"] > 0).sum(axis=(0, 2)).cumsum()
    k = max(1, int((totals <= MAX_ACTIVATIONS).sum()))
    return {name: values[:, :k] for name, values in tensors.items()}
