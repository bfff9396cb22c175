"""Temporal-consistency sparse autoencoders: train, measure, sweep.

import tcsae
run = tcsae.load_run("outputs/...")   # config, SAE and everything that was measured
sae = tcsae.load_sae("outputs/...")   # raw activations in, features out
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tcsae import consistency, metrics
    from tcsae.runs.folder import load_run, load_sae
    from tcsae.sae.formats.saelens_registry import register as register_with_saelens

__version__ = "0.1.0"
__all__ = ["consistency", "load_run", "load_sae", "metrics", "register_with_saelens"]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing tcsae costs nothing until something of it is used.
    import importlib

    if name in ("load_run", "load_sae"):
        return getattr(importlib.import_module("tcsae.runs.folder"), name)
    if name == "register_with_saelens":
        return importlib.import_module("tcsae.sae.formats.saelens_registry").register
    if name in ("consistency", "metrics"):
        return importlib.import_module(f"tcsae.{name}")
    raise AttributeError(f"module 'tcsae' has no attribute {name!r}")
