"""What is measured. Tensors in, numbers out; formulas and sources in each docstring.

The functions `autocorrelation`, ... below take precedence over the modules of the same name:
`tcsae.metrics.autocorrelation(features, max_lag)` is the function.
"""

from __future__ import annotations

from tcsae.metrics.activity import Activity, Smoothness
from tcsae.metrics.autocorrelation import (
    Autocorrelation,
    autocorrelation,
    correlation_length,
    integrated_time,
    window_consistency,
)
from tcsae.metrics.correlation import FeatureCorrelation, feature_correlation
from tcsae.metrics.position import PositionDependence, position_dependence
from tcsae.metrics.reconstruction import ModelMetrics, ReconstructionMetrics
from tcsae.metrics.suite import ConsistencySuite

__all__ = [
    "Activity",
    "Autocorrelation",
    "ConsistencySuite",
    "FeatureCorrelation",
    "ModelMetrics",
    "PositionDependence",
    "ReconstructionMetrics",
    "Smoothness",
    "autocorrelation",
    "correlation_length",
    "feature_correlation",
    "integrated_time",
    "position_dependence",
    "window_consistency",
]
