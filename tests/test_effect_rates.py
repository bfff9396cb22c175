"""The table of two rates and two lengths: its rows are the preset's, its figures as measured."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import REPOSITORY, run_here, small_job
from omegaconf import OmegaConf

import tcsae
from tcsae.config.compose import config_of
from tcsae.config.folder import conf_folder

sys.path.insert(0, str(REPOSITORY / "scripts"))

import effect_rates


def test_the_presets_trainings_are_rows_of_their_own_in_order() -> None:
    preset = OmegaConf.load(conf_folder() / "experiment" / "effect_rates.yaml")
    axes = preset.hydra.sweeper.params
    rows = [
        effect_rates.training_of(
            SimpleNamespace(config=config_of(f"training.lr={lr}", f"training.tokens={tokens}"))  # type: ignore[arg-type]
        )
        for tokens in axes["training.tokens"].split(",")
        for lr in axes["training.lr"].split(",")
    ]
    assert len(set(rows)) == 4
    assert sorted(reversed(rows), key=effect_rates._numbers) == rows


def test_a_row_has_what_both_runs_measured_and_their_difference(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    values = {}
    for weight, form in (("0", "none"), ("1", "scale_free")):
        folder = tmp_path / form
        changes = {"lambda": weight, "consistency": form, "training__tokens": "2000", "layer": "1"}
        changes |= {"window": "8", "store__dir": str(tmp_path / "store")}
        assert run_here(*small_job(tiny_gpt2, texts, folder, **changes)).code == 0
        metrics = tcsae.load_run(folder).final_info["metrics"]
        values[form] = metrics["reconstruction_quality"]["explained_variance"]
    ((training, row),) = effect_rates.results([tmp_path]).items()
    assert training.startswith("2,000 tokens")
    found = row["metrics"]["explained_variance"]
    assert found["before"]["value"] == pytest.approx(values["none"])
    assert found["after"]["value"] == pytest.approx(values["scale_free"])
    change = values["scale_free"] - values["none"]
    assert found["change"]["value"] == pytest.approx(change)
    text = effect_rates.text({training: row})
    assert f"{values['none']:.4f} → {values['scale_free']:.4f}: {change:+.4f}" in text
