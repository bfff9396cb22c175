"""What is measured. Tensors in, numbers out; formulas and sources in each docstring."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "autocorrelation": "autocorrelation",
    "Autocorrelation": "autocorrelation",
    "window_consistency": "autocorrelation",
    "integrated_time": "autocorrelation",
    "correlation_length": "autocorrelation",
    "position_dependence": "position",
    "PositionDependence": "position",
    "Activity": "activity",
    "ConsistencySuite": "suite",
    "feature_correlation": "correlation",
    "FeatureCorrelation": "correlation",
    "ReconstructionMetrics": "core",
    "ModelMetrics": "core",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tcsae.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tcsae.metrics.{_HOMES[name]}"), name)
