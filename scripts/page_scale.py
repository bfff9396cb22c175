"""How a run's page grows with d_sae: bytes, and seconds in headless Chromium.

    python scripts/page_scale.py RUN [--features 2304 16384 65536] [--as NAME] [--keep DIR]
    python scripts/page_scale.py        docs/performance.md's block from docs/page_scale.json

RUN is a finished run with its analysis. Its features are repeated, their numbers shaken by a tenth,
until there are as many as asked for; contexts as a larger evaluation has them. What is timed: the
writing; from the address typed to the first row of the table of features; to the last figure; a
feature that nobody has looked at yet, by its link; the first search for a word. Medians of 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pages import block, processor, replace_block
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from chrome import Page, chrome  # noqa: E402

from tcsae.measure.analysis import Analysis  # noqa: E402
from tcsae.measure.analysis_pass import CLOSE_FEATURES  # noqa: E402
from tcsae.measure.logit_lens import MOST_FEATURES  # noqa: E402
from tcsae.report.run_page import write_run_page  # noqa: E402
from tcsae.runs.folder import LoadedRun, load_run  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "page_scale.json"
FEATURES = (2304, 16_384, 65_536)
CONTEXT_COPIES = 4
"""256 held-out contexts of the embedded text become 1,024, as conf/dataset has for larger ones."""
ROUNDS = 3
WORD = "king"

# ------------------------------------------------------------------- a run with more features


def widened(run: LoadedRun, n_features: int) -> LoadedRun:
    """`run` with its features repeated up to `n_features`, nothing of it on disk."""
    generator = torch.Generator().manual_seed(0)
    own = run.sae.d_sae
    of_F = torch.arange(n_features) % own
    shaken_F = 1 + 0.1 * torch.randn(n_features, generator=generator)
    config = run.config.model_copy(
        update={"sae": run.config.sae.model_copy(update={"d_sae": n_features})}
    )
    details = run.core["eval_result_details"]
    core = run.core | {"eval_result_details": [details[i] for i in of_F.tolist()]}
    summary = run.consistency["summary"] | {"n_features": n_features}
    wide = dataclasses.replace(
        run,
        config=config,
        core=core,
        consistency=run.consistency | {"summary": summary},
        final_info=run.final_info | {"dict_size": n_features},
    )
    wide.sae.__dict__["_parameters"]["W_dec"] = torch.nn.Parameter(
        _noisy(run.sae.W_dec.detach()[of_F], generator)
    )
    wide.__dict__["per_feature"] = {
        name: value[..., of_F] * shaken_F if value.is_floating_point() else value[..., of_F]
        for name, value in run.per_feature.items()
    }
    if run.analysis is not None:
        wide.__dict__["analysis"] = _analysis(run.analysis, of_F, own, generator)
    return wide


def _noisy(W_FD: Tensor, generator: torch.Generator) -> Tensor:
    return W_FD + 0.02 * torch.randn(W_FD.shape, generator=generator)


def _spread(n: int, n_features: int) -> Tensor:
    """n numbers of features, evenly."""
    return torch.linspace(0, n_features - 1, n).long()


def _analysis(analysis: Analysis, of_F: Tensor, own: int, generator: torch.Generator) -> Analysis:
    n_features = len(of_F)
    close = _spread(min(CLOSE_FEATURES, n_features), n_features)
    columns = {
        name: [values[i] for i in of_F.tolist()]
        for name, values in analysis.specialization["features"].items()
    }
    is_close = set(close.tolist())
    for name in ("x", "y"):
        columns[name] = [
            v if v is None or i < own else (v + 0.3 * float(noise) if i in is_close else None)
            for i, (v, noise) in enumerate(
                zip(columns[name], torch.randn(n_features, generator=generator), strict=True)
            )
        ]
    copies_F = torch.randint(-(-n_features // own), (own,), generator=generator)
    document = dict(analysis.document)
    if document:
        moved = document["feature"].long() + own * copies_F[document["feature"].long()]
        document["feature"] = torch.where(moved < n_features, moved, moved % own).int()
    lens = dict(analysis.logit_lens)
    if lens:
        numbers = _spread(min(MOST_FEATURES, n_features), n_features)
        rows = numbers % own
        lens = {n: v[rows % len(v)] for n, v in lens.items()} | {"features": numbers}
    return dataclasses.replace(
        analysis,
        specialization=analysis.specialization | {"features": columns},
        top_contexts=_top_contexts(analysis.top_contexts, close, own),
        document=document,
        logit_lens=lens,
    )


def _top_contexts(found: dict[str, Tensor], close: Tensor, own: int) -> dict[str, Tensor]:
    """Each copy of a feature in the copies of its contexts."""
    n_contexts, rows = len(found["ids"]), (close % own) % len(found["features"])
    copy = (close // own) % CONTEXT_COPIES
    context = found["context"][rows]
    context = torch.where(context < 0, context, context + n_contexts * copy[:, None])
    return {
        "features": close,
        "context": context,
        **{name: found[name][rows] for name in ("position", "value", "rows")},
        **{name: found[name].repeat(CONTEXT_COPIES, 1) for name in ("ids", "valid")},
        "number": torch.arange(n_contexts * CONTEXT_COPIES),
    }


# ----------------------------------------------------------------------------- what is timed


def measured(run: LoadedRun, n_features: int, folder: Path) -> dict[str, Any]:
    """Figures of one size."""
    wide = widened(run, n_features)
    begun = time.monotonic()
    page = write_run_page(wide, folder / "report.html")
    found: dict[str, Any] = {"d_sae": n_features, "write_seconds": time.monotonic() - begun}
    beside = [path for path in folder.rglob("*") if path.is_file() and path != page]
    found |= {
        "page_bytes": page.stat().st_size,
        "beside_bytes": sum(path.stat().st_size for path in beside),
        "beside_files": len(beside),
        "largest_bytes": max((path.stat().st_size for path in beside), default=0),
    }
    rounds = [opened(page, n_features) for _ in range(ROUNDS)]
    return found | {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def opened(page: Path, n_features: int) -> dict[str, float]:
    """Seconds in a browser that has never seen the page."""
    with chrome() as tab:
        assert tab is not None, "no Chromium on PATH"
        tab.size(1400)
        found = {"listed": 0.0}
        begun = time.monotonic()
        tab.open(f"file://{page}")
        tab.wait("document.querySelector('#features-body tr')", 120)
        found["first_row_seconds"] = time.monotonic() - begun
        tab.wait("document.body.dataset.drawn", 120)
        found["drawn_seconds"] = time.monotonic() - begun
        found["listed"] = float(
            tab.run(
                "document.querySelector('#features-count').textContent"
                ".split(' of ')[1].split(' ')[0].replaceAll(',', '')"
            )
        )
        found["feature_seconds"] = _timed(
            tab,
            # The first feature of the table, most energetic of its kind, has contexts.
            "document.querySelector('#features-body tr button').click()",
            "document.querySelector('#feature-contexts > *') && "
            "!document.querySelector('#feature.waiting')",
        )
        tab.run("document.querySelector('#feature-close').click()")
        found["word_seconds"] = _timed(
            tab,
            "((box) => { box.value = '" + WORD + "'; box.dispatchEvent(new Event('input')); })"
            "(document.querySelector('#features-search'))",
            "/^[\\d,]+ of/.test(document.querySelector('#features-count').textContent)",
        )
        assert tab.messages == [], tab.messages
    return found


def _timed(tab: Page, action: str, done: str) -> float:
    begun = time.monotonic()
    tab.run(action)
    tab.wait(done, 120)
    return time.monotonic() - begun


# ---------------------------------------------------------------------------------- the page


def text(found: dict[str, Any]) -> str:
    """The block of docs/performance.md."""
    lines = [
        "| d_sae | | listed | page, MB | beside it, MB (files) | written, s | first row, s | "
        "all figures, s | another feature, s | first word, s |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in found["cases"]:
        beside = "-"
        if case["beside_files"]:
            beside = f"{case['beside_bytes'] / 1e6:.0f} ({case['beside_files']})"
        lines.append(
            f"| {case['d_sae']:,} | {case['name']} | {case['listed']:,.0f} "
            f"| {case['page_bytes'] / 1e6:.1f} | {beside} | {case['write_seconds']:.1f} "
            f"| {case['first_row_seconds']:.2f} | {case['drawn_seconds']:.2f} "
            f"| {case['feature_seconds']:.2f} | {case['word_seconds']:.2f} |"
        )
    where = (
        f"On {found['processor']}, {found['cores']} cores with a load of {found['load']:.0f} of "
        "other work; headless Chromium, `file://`."
    )
    return "\n".join([*lines, "", where])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--features", type=int, nargs="+", default=FEATURES)
    parser.add_argument("--as", dest="name", default="now", help="in the table's second column")
    parser.add_argument("--keep", type=Path, help="a folder for the pages")
    given = parser.parse_args(arguments)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"cases": []}
    load = os.getloadavg()[0]  # of before this run
    for n_features in given.features if given.run else ():
        with tempfile.TemporaryDirectory() as temporary:
            folder = (given.keep or Path(temporary)) / str(n_features)
            folder.mkdir(parents=True, exist_ok=True)
            case = {"name": given.name, **measured(load_run(given.run), n_features, folder)}
        print(json.dumps(case), flush=True)
        same = (case["d_sae"], case["name"])
        known["cases"] = [c for c in known["cases"] if (c["d_sae"], c["name"]) != same] + [case]
        known |= {"processor": processor(), "cores": os.cpu_count(), "load": load}
    known["cases"].sort(key=lambda c: (c["d_sae"], c["name"] == "now"))
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    replace_block(PAGE, block("page scale", text(known)))
    print(text(known))


if __name__ == "__main__":
    main()
