"""What metrics are called, what they mean in a line, how numbers and tables are written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Label(NamedTuple):
    """How people read a metric."""

    name: str
    meaning: str


LABELS: dict[str, Label] = {
    "explained_variance": Label("Explained variance", "1 - squared error / variance of the input"),
    "explained_variance_legacy": Label(
        "Explained variance, per token", "SAEBench's older form: mean over tokens"
    ),
    "mse": Label("Squared error", "mean over tokens and dimensions"),
    "cossim": Label("Cosine", "of input and reconstruction, mean over tokens"),
    "l0": Label("L0", "features on per token"),
    "l1": Label("L1", "sum of activations per token"),
    "l2_ratio": Label(
        "L2 ratio", "norm of the reconstruction / norm of the input; below 1: shrunk"
    ),
    "l2_norm_in": Label("Norm of the input", "mean over tokens"),
    "l2_norm_out": Label("Norm of the reconstruction", "mean over tokens"),
    "relative_reconstruction_bias": Label("Reconstruction bias", "E|xhat|^2 / E<x, xhat>; 1: none"),
    "frac_alive": Label(
        "Live features", "share that fired on these tokens; more tokens, more of them"
    ),
    "live_share": Label(
        "Live features, estimated", "share that ever fire, by how many were seen in few documents"
    ),
    "ce_loss_score": Label(
        "CE loss score", "share of the cross-entropy lost by ablation that the SAE wins back"
    ),
    "ce_loss_with_sae": Label("Cross-entropy with the SAE", "nats per token"),
    "ce_loss_without_sae": Label("Cross-entropy of the model", "nats per token"),
    "ce_loss_with_ablation": Label("Cross-entropy with zeros", "nats per token"),
    "kl_div_score": Label(
        "KL score", "share of the divergence caused by ablation that the SAE wins back"
    ),
    "kl_div_with_sae": Label("KL with the SAE", "nats per token"),
    "kl_div_with_ablation": Label("KL with zeros", "nats per token"),
    "freq_over_1_percent": Label("Features on above 1 %", "share of features, by density"),
    "freq_over_10_percent": Label("Features on above 10 %", "share of features, by density"),
    "normalized_freq_over_1_percent": Label("Firings of those above 1 %", "share of all firings"),
    "normalized_freq_over_10_percent": Label("Firings of those above 10 %", "share of all firings"),
    "average_max_encoder_cosine_sim": Label(
        "Nearest encoder direction", "mean over features of the largest cosine with another"
    ),
    "average_max_decoder_cosine_sim": Label(
        "Nearest decoder direction", "mean over features of the largest cosine with another"
    ),
    "total_tokens_eval_reconstruction": Label("Tokens behind CE and KL", "valid tokens"),
    "total_tokens_eval_sparsity_variance": Label("Tokens behind the rest", "valid tokens"),
    "rho_1": Label("Autocorrelation rho_1", "of a feature with itself one token later"),
    "correlation_length": Label("Correlation length", "first lag with rho below 1/e, tokens"),
    "tau_int": Label("Correlation time", "1 + 2 sum of rho_k, tokens; 1: no memory"),
    "eta_squared": Label("Position share eta²", "variance explained by position; biased upwards"),
    "omega_squared": Label(
        "Position share omega²", "variance explained by position; 0: position-invariant"
    ),
    "mutual_information": Label("Position information", "of firing and position, nats"),
    "mutual_information_share": Label(
        "Position information, share", "divided by the entropy of firing"
    ),
    "persistence": Label("Persistence", "P(on | on a token ago) - P(on | off a token ago)"),
    "run_length": Label("Run length", "mean number of tokens a feature stays on"),
    "density": Label("Density", "share of tokens on which a feature is on"),
    "mean_activation": Label("Mean activation", "where the feature is on"),
    "amplitude_cv": Label("Amplitude CV", "standard deviation / mean, where the feature is on"),
    "smoothness": Label("Smoothness (T-SAE)", "depends on scale; for that paper's tables only"),
    "smoothness_first_group": Label("Smoothness (T-SAE), first group", "of an SAE with groups"),
    "smoothness_second_group": Label("Smoothness (T-SAE), the rest", "of an SAE with groups"),
    "share_position": Label("Variance between positions", "share of the whole: omega²"),
    "share_document": Label("Variance between documents", "share of the whole, positions alike"),
    "share_window": Label("Variance between windows", "of one document; share of the whole"),
    "share_flicker": Label("Variance within windows", "share of the whole: flicker"),
    "edge_energy": Label(
        "Edge energy", "activity squared at positions 1 to 7 over that of the rest; 1: alike"
    ),
    "layout_share": Label(
        "Layout share", "of a feature's activation: on line ends, punctuation, headings, names"
    ),
    "token_entropy": Label("Token entropy", "of the tokens a feature fires on, nats"),
    "log_density": Label("log10 density", "share of tokens on which a feature is on"),
    "c0": Label("Energy", "variance of a feature about its position means"),
    "redundant_share": Label("Redundant share", "live features that copy another one"),
    "twinned_share": Label("Features with a position twin", "same direction, different positions"),
    "effective_rank": Label("Effective rank", "of the feature correlation matrix"),
    "modularity": Label("Modularity", "of the clusters of features that fire together"),
    "modularity_excess": Label(
        "Modularity above chance", "less that of features with shuffled documents"
    ),
    "ari_seeds": Label("Agreement over seeds", "adjusted Rand index; 1: the same clusters"),
    "ari_halves": Label("Agreement of halves", "adjusted Rand index of two halves of the text"),
    "ami_decoder": Label(
        "Agreement with directions", "adjusted mutual information with decoder clusters"
    ),
}

_POSITION = {
    "probe_context_token": Label(
        "Probe: document, one token", "accuracy of 5 features a class: which document it is from"
    ),
    "probe_context_document": Label(
        "Probe: document, half of it", "the same, of the mean over the document's other half"
    ),
    "probe_context_tokens": Label(
        "Probe: document, tokens needed", "averaged, for 95 % of what the half gives over chance"
    ),
    "probe_context_transfer": Label(
        "Probe: document, lost between positions",
        "accuracy at later positions less that of probes learned at earlier ones",
    ),
    "probe_semantics_transfer": Label(
        "Probe: semantics, lost between positions",
        "accuracy at later positions less that of probes learned at earlier ones",
    ),
    "probe_semantics_token": Label(
        "Probe: semantics, one token", "accuracy of 5 features a class: the document's label"
    ),
    "probe_semantics_document": Label(
        "Probe: semantics, document", "the same, of the mean over all tokens of the document"
    ),
    "probe_semantics_tokens": Label(
        "Probe: semantics, tokens needed", "averaged, for 95 % of the document's score over chance"
    ),
    "probe_syntax_token": Label(
        "Probe: syntax, one token", "accuracy of 5 features a class: the word's part of speech"
    ),
    "shift_jaccard": Label(
        "Shift: Jaccard", "active features that a token keeps in later contexts"
    ),
    "shift_cosine": Label("Shift: cosine", "of a token's codes in contexts that start later"),
    "shift_correlation": Label("Shift: correlation", "of a feature with itself, the same tokens"),
    "shift_input_cosine": Label("Shift: cosine of activations", "what the model itself keeps"),
    "shift_moved": Label(
        "Shift: moved", "1 - cosine of codes over that of activations; above 1: codes move more"
    ),
}
_LENGTHS = {
    "explained_variance": ("explained variance", "over that within the training length"),
    "l0": ("L0", "over that within the training length"),
    "omega_squared": ("omega²", "variance between the positions of that block"),
}
LABELS |= _POSITION | {
    f"lengths_{name}_{n}x": Label(f"Length {n} x: {said}", meaning)
    for name, (said, meaning) in _LENGTHS.items()
    for n in (2, 4)
}

_TRUTH = {
    "mcc": Label("Truth: MCC", "mean cosine of the true directions with their matches"),
    "cosine": Label("Truth: cosine", "of the true direction with its match"),
    "found": Label("Truth: found", "share with a cosine above 0.9"),
    "precision": Label(
        "Truth: precision", "share of the match's firings at which the feature is on"
    ),
    "recall": Label("Truth: recall", "share of the feature's tokens at which the match fires"),
    "f1": Label("Truth: F1", "of firing, from the two"),
    "pieces": Label("Truth: pieces", "that a true run is broken in where it is hit; 1: no flicker"),
    "broken": Label("Truth: broken", "share of the runs that are hit in more than one piece"),
    "missed": Label("Truth: missed", "share of the true runs that are not hit at all"),
    "delay": Label("Truth: delay", "tokens from the start of a run to the first firing"),
    "lag": Label("Truth: lag", "tokens that the match stays on after the end of a run"),
    "recall_with_child": Label(
        "Truth: parents' recall with a child", "at their tokens with a child on; low: absorption"
    ),
    "recall_without_child": Label(
        "Truth: parents' recall without one", "at their tokens with no child on"
    ),
}
"""Of true features (model=synthetic), by what stands behind truth_."""

DEFAULT_WINDOW = 8
SPARSE_WORDS = "on at less than 10 % of the tokens"

_WINDOW_PARTS = {
    "C": (
        "Window consistency",
        "how far a feature keeps its value over {} tokens; 1: wholly, 0: chance",
    ),
    "D": ("Document part", "of it, what a feature keeps over the document, from lag 4 x {} on"),
    "L": (
        "Local consistency",
        "what a feature keeps over {} tokens beyond what it keeps over the document",
    ),
}

SINGLES = (
    "live_share",
    "edge_energy",
    "smoothness",
    "smoothness_first_group",
    "smoothness_second_group",
)
"""Numbers of the consistency summary that are no mean over features."""

OLDER_INTERVALS = (
    "by an older version that drew contexts: where documents have several they are too narrow"
)


def from_documents(measured: Mapping[str, Any]) -> str:
    """ " from 143 documents", where that is known."""
    n = measured.get("n_documents")
    return "" if n is None else f" from {n:,} document{'s' if n != 1 else ''}"


def interval_words(summary: Mapping[str, Any]) -> str:
    """What the intervals of a run are, in a sentence; of a consistency summary."""
    level = f"{100 * summary['level']:g} % interval"
    if "n_documents" not in summary:
        return f"{level} {OLDER_INTERVALS}."
    if summary["interval_reason"]:
        return f"No intervals: {summary['interval_reason']}."
    return f"{level} over documents (jackknife, Student's t)."


HEADLINE = (
    "explained_variance",
    "l0",
    "frac_alive",
    "l2_ratio",
    "ce_loss_score",
    "kl_div_score",
)
"""Of SAEBench's core metrics, what people look at first."""


def label(name: str) -> Label:
    """Label of a metric, those of a window (`C_8`, `L_8_sparse`) included; an unknown name stands
    for itself."""
    if (part := window_part(name)) is not None:
        said, meaning = _WINDOW_PARTS[part.kind]
        found = Label(f"{said} {part.kind}_{part.window}", meaning.format(part.window))
        if part.sparse:
            return Label(f"{found.name}, sparse", f"{found.meaning}; of features {SPARSE_WORDS}")
        return found
    return _truth_label(name) or LABELS.get(name, Label(name, ""))


def _truth_label(name: str) -> Label | None:
    """Of `truth_found` and `truth_found_<class>`; None for any other name."""
    kind, _, rest = name.partition("_")
    if kind != "truth":
        return None
    if rest in _TRUTH:
        return _TRUTH[rest]
    what, _, features = rest.partition("_")
    said = _TRUTH.get(what)
    return None if said is None else Label(f"{said.name}, {features}", said.meaning)


class WindowPart(NamedTuple):
    """What a metric's name says: "L_8_sparse" is ("L", 8, True)."""

    kind: str
    window: int
    sparse: bool


def window_part(name: str) -> WindowPart | None:
    """The parts of the name of a window's metric, None for any other."""
    found = re.fullmatch(r"([CDL])_(\d+)(_sparse)?", name)
    return None if found is None else WindowPart(found[1], int(found[2]), found[3] is not None)


def local_window(names: Iterable[str], wanted: int | None) -> int | None:
    """The W of the L_W to show: the one wanted, else 8 or the largest below it, else the smallest;
    None if there is none among the names."""
    parts = map(window_part, names)
    known = sorted({p.window for p in parts if p and p.kind == "L" and not p.sparse})
    if wanted in known:
        return wanted
    return max([w for w in known if w <= DEFAULT_WINDOW] or known[:1], default=None)


def local_names(window: int | None) -> list[str]:
    """The metrics of a window that stand beside its C_W; none without a window."""
    return [] if window is None else [f"L_{window}", f"D_{window}", f"L_{window}_sparse"]


def number(value: float | None, digits: int = 3) -> str:
    """A number as people write it: 3 decimals near 1, fewer for large ones; n/a for None."""
    if value is None or value != value:
        return "n/a"
    if float(value).is_integer() and abs(value) >= 10:
        return f"{value:,.0f}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if size >= 10:
        return f"{value:.2f}"
    if 0 < size < 10.0**-digits:
        return f"{value:.2g}"
    return f"{value:.{digits}f}"


def interval_text(interval: Sequence[float | None] | None) -> str:
    """An interval as "[0.041, 0.052]", or nothing."""
    if not interval or interval[0] is None or interval[1] is None:
        return ""
    return f"[{number(interval[0])}, {number(interval[1])}]"


SPREAD = {"median": "medians", "q99": "q99"}
"""What `spread_text` needs, and where a comparison's group has it."""


def spread_text(entry: Mapping[str, Any]) -> str:
    """Whether a mean is that of many features or of a few; empty where it was not measured.

    Args:
        entry: of a summary's `metrics`.
    """
    if entry.get("q99") is None or entry.get("median") is None:
        return ""
    return (
        f"over features: median {number(entry['median'])}, 99th percentile {number(entry['q99'])}"
    )


def decimals(low: float | None, high: float | None) -> int:
    """Decimals that show an interval's width with two digits, and on which side of 0 it ends;
    3 at least, 7 at most."""
    if low is None or high is None or high <= low:
        return 3
    digits = 1 - math.floor(math.log10(high - low))
    nearest = min(abs(low), abs(high))
    if 0 < nearest < 0.5 * 10.0**-digits:
        digits = -math.floor(math.log10(nearest))
    return min(7, max(3, digits))


def difference_text(value: float | None, low: float | None, high: float | None) -> str:
    """A difference as "-0.0101 [-0.0112, -0.0095]", with the decimals its interval is worth."""
    if value is None:
        return "n/a"
    if low is None or high is None:
        return f"{value:+.2g}" if value else "0"
    digits = decimals(low, high)
    return f"{value:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def listed(names: Sequence[str]) -> str:
    """Names as "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> str:
    """`rule`: under every column but the first, "---:" for numbers."""
    lines = [header, ["---", *[rule] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in r)} |" for r in lines)


def size(n_bytes: float) -> str:
    """1.23 TB, 45.6 GB, 7.8 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes / 1e6:.3g} MB"
