"""Everything a run can be told, as frozen records. No torch below this line.

`run` has the schema of conf/ and what a run is called, `sae` the options of every architecture,
`launcher` those of a launcher, `compose` the way from Hydra to the schema.
"""

from __future__ import annotations

from tcsae.config.run import (
    AVERAGED,
    TEMPORAL_FORMS,
    Config,
    ConsistencyConfig,
    DatasetConfig,
    EvaluationConfig,
    LoadedConfig,
    LoadedSAE,
    Measured,
    ModelConfig,
    Source,
    StoreConfig,
    TrackingConfig,
    TrainingConfig,
    identity,
    parse,
    parse_any,
    parse_loaded,
    place_of,
    resolve_layer,
    run_id,
    run_name,
    shared_by_a_bank,
)

__all__ = [
    "AVERAGED",
    "TEMPORAL_FORMS",
    "Config",
    "ConsistencyConfig",
    "DatasetConfig",
    "EvaluationConfig",
    "LoadedConfig",
    "LoadedSAE",
    "Measured",
    "ModelConfig",
    "Source",
    "StoreConfig",
    "TrackingConfig",
    "TrainingConfig",
    "identity",
    "parse",
    "parse_any",
    "parse_loaded",
    "place_of",
    "resolve_layer",
    "run_id",
    "run_name",
    "shared_by_a_bank",
]
