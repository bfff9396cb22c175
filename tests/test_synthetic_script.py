"""The table of synthetic truth: its rows are those of the preset, its verdict its figures'."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import REPOSITORY
from omegaconf import OmegaConf

from tcsae.config.compose import conf_folder, config_of

sys.path.insert(0, str(REPOSITORY / "scripts"))

import synthetic


def points(experiment: str) -> list[str]:
    """Every point of a preset, lists of values taken apart."""
    from itertools import product

    preset = OmegaConf.load(conf_folder() / "experiment" / f"{experiment}.yaml")
    found = []
    for point in preset.hydra.sweeper.points:
        parts = [part.partition("=") for part in point.split()]
        values = [v.split(",") if "[" not in v else [v] for _, _, v in parts]
        for chosen in product(*values):
            found.append(" ".join(f"{k}={v}" for (k, _, _), v in zip(parts, chosen, strict=True)))
    return found


def test_every_point_of_the_preset_is_a_row_of_its_own() -> None:
    rows = []
    for point in points("synthetic_first_group"):
        config = config_of("+experiment=synthetic_first_group", *point.split())
        assert config.model.world is not None
        assert config.model.world.name == "absorption"
        rows.append(synthetic.arm_of(SimpleNamespace(config=config)))  # type: ignore[arg-type]
    assert sorted(rows) == sorted(synthetic.ROWS)


@pytest.mark.parametrize("world", ["easy", "absorption", "bound"])
def test_every_point_of_the_large_preset_is_a_job_on_one_stream(world: str) -> None:
    from tcsae.config import run_id, shared_by_a_bank

    configs = [
        config_of("+experiment=synthetic", f"world={world}", *point.split())
        for point in points("synthetic")
    ]
    assert len({run_id(config) for config in configs}) == 29
    assert all(shared_by_a_bank(c) == shared_by_a_bank(configs[0]) for c in configs)
    architectures = {config.sae.architecture for config in configs}
    assert {"standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"} <= architectures


def entry(value: float, low: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": None if low is None else 2 * value - low}


@pytest.mark.parametrize(
    ("control", "low", "holds"),
    [(0.15, 0.05, True), (0.15, -0.01, False), (0.08, 0.05, False), (0.15, None, False)],
)
def test_what_was_wanted_is_said_to_hold_only_where_it_does(
    control: float, low: float | None, holds: bool
) -> None:
    numbers = {name: entry(0.5, 0.4) for name in synthetic.METRICS}
    found = {
        "absorption": {
            "seeds": [0, 1, 2],
            "tokens": 1000,
            "values": {row: numbers for row in synthetic.ROWS},
            "found_more_than": {
                synthetic.CONTROL: entry(control, low),
                synthetic.TSAE: entry(0.2, 0.1),
            },
        }
    }
    text = synthetic.text(found)
    assert ("**no:**" not in text) == holds
    assert f"+{control:.3f}" in text
