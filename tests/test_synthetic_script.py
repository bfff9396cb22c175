"""The table of synthetic truth: its rows are those of the preset, its verdict its figures'."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import REPOSITORY
from omegaconf import OmegaConf

from tcsae.config.compose import config_of
from tcsae.config.folder import conf_folder
from tcsae.data.synthetic import World

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


FIRST_GROUP = [
    "matryoshka, none",
    "first group, lambda 1",
    "first group, lambda 3",
    "first group, lambda 3, control",
    "T-SAE",
    "topk, none",
    "batchtopk, none",
]
STUDY = [
    "matryoshka, none",
    "first group, lambda 10",
    "first group, lambda 10, control",
    *synthetic.OTHERS,
]


@pytest.mark.parametrize(
    ("preset", "rows", "width", "loss"),
    [
        ("synthetic_first_group", FIRST_GROUP, 96, "first group, lambda 3"),
        ("synthetic_study", STUDY, 256, "first group, lambda 10"),
    ],
)
def test_every_point_of_a_preset_is_a_row_of_its_own(
    preset: str, rows: list[str], width: int, loss: str
) -> None:
    found, studies = [], set()
    for point in points(preset):
        config = config_of(f"+experiment={preset}", *point.split())
        assert config.model.world is not None
        assert config.model.world.d_in == width
        run: Any = SimpleNamespace(config=config)
        found.append(synthetic.arm_of(run))
        studies.add(synthetic.study_of(run))
    assert sorted(found, key=synthetic.order) == rows
    assert len(studies) == 1
    assert synthetic.loss_of(dict.fromkeys(found)) == loss


@pytest.mark.parametrize("world", ["easy_256", "absorption_256", "bound_256"])
def test_a_world_at_size_is_the_small_one_with_more_of_each(world: str) -> None:
    large, small = (
        config_of("model=synthetic", f"world={name}", "training.target_l0=null").model.world
        for name in (world, world.removesuffix("_256"))
    )
    assert large is not None and small is not None
    assert World(large).n_true - (16 if large.position else 0) == 1024
    assert {name: its.density for name, its in large.classes.items()} == {
        name: its.density for name, its in small.classes.items()
    }


@pytest.mark.parametrize("world", ["easy", "absorption", "bound"])
def test_every_point_of_the_large_preset_is_a_job_on_one_stream(world: str) -> None:
    from tcsae.config import run_id, shared_by_a_bank

    configs = [
        config_of("+experiment=synthetic", f"world={world}", *point.split())
        for point in points("synthetic")
    ]
    assert len({run_id(config) for config in configs}) == 30
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
    less = dict.fromkeys(synthetic.CONTRASTS, entry(0.2, 0.1))
    study = {
        "loss": "first group, lambda 3",
        "selection": "token",
        "on": "a processor",
        "seeds": dict.fromkeys(FIRST_GROUP, [0, 1, 2]),
        "values": dict.fromkeys(FIRST_GROUP, numbers),
        "loss_minus": {
            "first group, lambda 3, control": less | {"truth_found": entry(control, low)},
            "T-SAE": less,
        },
        "found_by_class": {},
    }
    text = synthetic.text({"`absorption`": study})
    assert ("**no:**" not in text) == holds
    assert f"+{control:.3f}" in text


def test_the_map_has_a_row_a_study_and_only_what_was_compared() -> None:
    arms = ["matryoshka, none", "first group, lambda 10", "first group, lambda 10, control"]
    values = {arm: {"truth_found": entry(0.1 * n)} for n, arm in enumerate(arms, start=5)}
    less = {"truth_found": entry(0.1, 0.08), "truth_recall_with_child": entry(0.3)}
    study = {
        "loss": arms[1],
        "seeds": {arm: [0, 1, 2] for arm in arms},
        "values": values,
        "loss_minus": {arms[0]: less, arms[2]: less},
    }
    name = "`{}`, 1,500,000 tokens of 2 contexts a step, learning rate 0.005, 1,024 features"
    table = synthetic.the_map(
        {name.format("absorption"): study, name.format("absorption_256"): study}
    ).splitlines()
    at_size, small = table[2:]
    cells = [cell.strip() for cell in at_size.strip("|").split("|")]
    assert cells[:6] == ["`absorption_256`", "1,500,000", "1,024", "3", "0.50", "0.60"]
    assert cells[6:] == ["+0.10 [+0.08, +0.12]", "+0.10 [+0.08, +0.12]", "n/a", "+0.30"]
    assert small.startswith("| `absorption` |")
