"""The figures of docs/results, from results.json alone. Needs matplotlib (the test extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcsae.report.plots import OKABE_ITO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("tradeoff.svg", "ablation.svg", "autocorrelation.svg")
TITLES = {"smollm2": "SmolLM2-135M, layer 15", "gemma3": "Gemma 3 270M, layer 9"}
_FORMS = {
    "scale_free": ("scale-free", OKABE_ITO[0], "o"),
    "window_variance": ("literal", OKABE_ITO[4], "s"),
    "shuffled": ("shuffled control", OKABE_ITO[6], "x"),
    "slow": ("slow features", OKABE_ITO[2], "^"),
    "batch_history": ("batch history", OKABE_ITO[1], "D"),
    "tsae-control": ("Temporal SAE, control", OKABE_ITO[6], "+"),
    "tsae": ("Temporal SAE", OKABE_ITO[3], "*"),
    "persistent": ("persistent SAE", OKABE_ITO[5], "v"),
}
_OPEN = {"standard": "none", "jumprelu": "none"}


def _form_of(arm: str) -> str:
    return next(form for form in _FORMS if arm.startswith(form))


def _bars(entry: Mapping[str, Any]) -> list[list[float]] | None:
    if entry["low"] is None:
        return None
    return [[entry["value"] - entry["low"]], [entry["high"] - entry["value"]]]


def _figure(columns: int, height: float = 4.2) -> tuple[Figure, Sequence[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # One file for one content, in any environment: no date, no random ids, text as text.
    plt.rcParams.update(
        {"svg.hashsalt": "tcsae", "svg.fonttype": "none", "font.family": "sans-serif",
         "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )  # fmt: skip
    figure, axes = plt.subplots(
        1, columns, figsize=(4.6 * columns, height), squeeze=False, layout="constrained"
    )
    return figure, list(axes[0])


def _save(figure: Figure, path: Path) -> None:
    """With one legend under all panels, out of the data's way."""
    import matplotlib.pyplot as plt

    named: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, said in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(said, handle)
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def tradeoff(results: Mapping[str, Any], path: Path) -> None:
    """Change of C_8 against change of explained variance, an arm a point, a model a panel."""
    models = [model for model in TITLES if any(t.split(".")[0] == model for t in results)]
    figure, axes = _figure(len(models))
    for axis, model in zip(axes, models, strict=True):
        for table, found in results.items():
            if table.split(".")[0] != model:
                continue
            for arm, row in found["rows"].items():
                x, y = (row["deltas"].get(name) for name in ("explained_variance", "C_8"))
                if not x or not y or x["value"] is None or y["value"] is None:
                    continue
                form = _form_of(arm)
                said, colour, marker = _FORMS[form]
                axis.errorbar(
                    x["value"], y["value"], xerr=_bars(x), yerr=_bars(y), fmt=marker, ms=6, lw=0.8,
                    color=colour, mfc=_OPEN.get(table.split(".")[1], colour),
                    label=said,
                )  # fmt: skip
        axis.axhline(0, lw=0.6, color="0.6")
        axis.axvline(0, lw=0.6, color="0.6")
        # Most arms lie near 0, the strongest far out: linear within the threshold, then by decades.
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_yscale("symlog", linthresh=0.02)
        axis.set_xticks([-0.1, -0.01, -0.005, 0], ["-0.1", "-0.01", "-0.005", "0"])
        ticks = ["-0.01", "0", "0.01", "0.02", "0.1", "0.3"]
        axis.set_yticks([float(tick) for tick in ticks], ticks)
        axis.set_xlim(-0.5, 0.005)
        axis.set_ylim(-0.016, 0.7)
        axis.set_title(TITLES[model])
        axis.set_xlabel("change of explained variance (open: standard L1, JumpReLU)")
        axis.set_ylabel("change of C_8 at matched L0")
    _save(figure, path)


def _series(rows: Mapping[str, Any], arms: Sequence[str], metric: str) -> tuple[list[Any], ...]:
    entries = [rows[arm]["metrics"][metric] for arm in arms]
    values = [e["value"] for e in entries]
    return values, [[e[k] for e in entries] for k in ("low", "high")]


def ablation(results: Mapping[str, Any], path: Path) -> None:
    """lambda at window 8, the window at lambda 1: C_8, explained variance, omega² (topk)."""
    rows = results["smollm2.topk"]["rows"]
    baseline = "baseline-32"
    by_lambda = {0.0: baseline} | {
        weight: arm
        for weight in (0.05, 0.1, 0.15, 0.2, 0.3, 1, 3)
        if (arm := f"scale_free-w8-l{weight:g}") in rows
    }
    by_window = {
        window: arm
        for window in (2, 4, 8, 16, 32, "document")
        if (arm := f"scale_free-w{window}-l1") in rows
    }
    figure, axes = _figure(2)
    metrics = ("C_8", OKABE_ITO[0], "C_8"), ("omega_squared", OKABE_ITO[4], "omega²")
    for axis, places, title in (
        (axes[0], by_lambda, "window 8"),
        (axes[1], by_window, "lambda 1"),
    ):
        x = list(range(len(places)))
        other = axis.twinx()
        for metric, colour, said in metrics:
            values, (low, high) = _series(rows, list(places.values()), metric)
            axis.plot(x, values, "o-", color=colour, label=said, ms=4)
            axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        values, (low, high) = _series(rows, list(places.values()), "explained_variance")
        other.plot(x, values, "s--", color="0.4", ms=4, label="explained variance (right)")
        other.fill_between(x, low, high, color="0.4", alpha=0.15, lw=0)
        other.spines["right"].set_visible(True)
        axis.set_xticks(x, [f"{place:g}" if place != "document" else "doc." for place in places])
        axis.set_xlabel("lambda" if title == "window 8" else "window")
        axis.set_title(f"SmolLM2, topk, scale-free, {title}")
        axis.set_ylabel("C_8, omega²")
        other.set_ylabel("explained variance")
    _save(figure, path)


def autocorrelation(results: Mapping[str, Any], path: Path) -> None:
    """rho(k) of the main arms of topk, both models."""
    arms = {
        "baseline-32": ("baseline", "0.3"),
        "scale_free-w8-l1": ("scale-free, lambda 1", OKABE_ITO[0]),
        "shuffled-w8-l1": ("shuffled control, lambda 1", OKABE_ITO[6]),
        "window_variance-w8-l0.2": ("literal, lambda 0.2", OKABE_ITO[4]),
    }
    models = [model for model in TITLES if f"{model}.topk" in results]
    figure, axes = _figure(len(models), 3.6)
    for axis, model in zip(axes, models, strict=True):
        rows = results[f"{model}.topk"]["rows"]
        for arm, (said, colour) in arms.items():
            if arm not in rows:
                continue
            curve = rows[arm]["curve"]
            known = slice(1, None)
            axis.plot(curve["lags"][known], curve["rho"][known], color=colour, label=said)
            axis.fill_between(
                curve["lags"][known], curve["low"][known], curve["high"][known], color=colour,
                alpha=0.2, lw=0,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_title(f"{TITLES[model]}, topk")
        axis.set_xlabel("lag (tokens)")
        axis.set_ylabel("autocorrelation, energy-weighted")
    _save(figure, path)


def write_figures(results: Mapping[str, Any], folder: Path) -> None:
    for name, draw in zip(FIGURES, (tradeoff, ablation, autocorrelation), strict=True):
        draw(results, folder / name)
