"""The table beside the Temporal SAE: its rows are those of the preset, its verdict its figures'."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import REPOSITORY
from omegaconf import OmegaConf

from tcsae.config.compose import config_of
from tcsae.config.folder import conf_folder

sys.path.insert(0, str(REPOSITORY / "scripts"))

import effect_groups


def test_every_point_of_the_preset_is_a_row_of_its_own() -> None:
    preset = OmegaConf.load(conf_folder() / "experiment" / "effect_first_group.yaml")
    points = [
        p.replace("lambda=1,3", f"lambda={w}") for p in preset.hydra.sweeper.points for w in "13"
    ]
    rows = set()
    for point in set(points):
        config = config_of("+experiment=effect_first_group", *point.split())
        rows.add(effect_groups.arm_of(SimpleNamespace(config=config)))  # type: ignore[arg-type]
    assert rows == set(effect_groups.ROWS)


@pytest.mark.parametrize(
    ("ours", "omega_low", "holds"),
    [(0.14, -0.001, True), (0.12, -0.001, False), (0.14, 0.001, False)],
)
def test_what_was_wanted_is_said_to_hold_only_where_it_does(
    ours: float, omega_low: float, holds: bool
) -> None:
    def entry(value: float, low: float | None = None) -> dict[str, Any]:
        return {"value": value, "low": low, "high": None if low is None else value, "reason": None}

    numbers = {name: entry(0.5) for name in effect_groups.METRICS}
    found = {
        "seeds": [0, 1, 2],
        "tokens": 1000,
        "values": {row: numbers for row in effect_groups.ROWS},
        "at_their_price": {
            "price": 0.01,
            "where": "between none and first group, lambda 1",
            "L_8_sparse": {
                "ours": entry(ours),
                "theirs": entry(0.1),
                "difference": entry(ours - 0.1),
            },
            "omega_squared": entry(0.002, omega_low),
        },
    }
    text = effect_groups.text(found)
    assert ("**no:**" not in text) == holds
    assert f"{ours / 0.1:.1f} x" in text
