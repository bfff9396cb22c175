"""Temporal-consistency sparse autoencoders: train, measure, sweep.

import tcsae
run = tcsae.open("outputs/...")       # a run, the latest of a folder, or an SAE of SAELens
run.features("any text")              # tokens, values [T, F], masks; .top(), .strip(j)
run.table(), run.feature(17)          # what was measured, of all features or of one
run.steer("a prompt", 17, 3)          # how the model goes on with the feature set
tcsae.compare(run, baseline)          # as python -m tcsae.compare does
run = tcsae.load_run("outputs/...")   # this run and no other
sae = tcsae.load_sae("outputs/...")   # raw activations in, features out
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tcsae import compare, consistency, metrics
    from tcsae.jobs.opening import open_ as open
    from tcsae.runs.folder import load_run, load_sae
    from tcsae.sae.formats.saelens_registry import register as register_with_saelens

__version__ = "0.1.0"
__all__ = [
    "compare",
    "consistency",
    "load_run",
    "load_sae",
    "metrics",
    "open",
    "register_with_saelens",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing tcsae costs nothing until something of it is used.
    import importlib

    if name in ("load_run", "load_sae"):
        return getattr(importlib.import_module("tcsae.runs.folder"), name)
    if name == "open":
        return importlib.import_module("tcsae.jobs.opening").open_
    if name == "register_with_saelens":
        return importlib.import_module("tcsae.sae.formats.saelens_registry").register
    if name in ("compare", "consistency", "metrics"):
        return importlib.import_module(f"tcsae.{name}")
    raise AttributeError(f"module 'tcsae' has no attribute {name!r}")
