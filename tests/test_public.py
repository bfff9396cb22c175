"""The names that users and scripts rely on."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

import tcsae


def test_contract_functions_are_where_the_contract_says() -> None:
    features = torch.rand(40, 16, 3, generator=torch.Generator().manual_seed(0))
    mask = {"segments": torch.zeros(40, 16, dtype=torch.long), "valid": torch.ones(40, 16).bool()}
    assert tcsae.consistency.window_variance(features, 4, **mask).ndim == 0
    rho = tcsae.metrics.autocorrelation(features, 4, **mask)
    assert rho.shape == (5, 3)
    assert tcsae.metrics.window_consistency(rho, 4).shape == (3,)
    assert tcsae.metrics.integrated_time(rho).shape == (3,)
    position = tcsae.metrics.position_dependence(features, valid=mask["valid"])
    for name in ("eta_squared", "omega_squared", "mutual_information"):
        assert getattr(position, name).shape == (3,)
    correlation = tcsae.metrics.feature_correlation(features, 2, **mask)
    assert correlation.values.shape == correlation.lags.shape == (3, 3)
    assert list(inspect.signature(tcsae.load_run).parameters) == ["folder"]
    assert list(inspect.signature(tcsae.load_sae).parameters) == ["folder"]


def test_accumulators_update_compute_and_reset() -> None:
    features = torch.rand(8, 16, 3)
    accumulator = tcsae.metrics.Autocorrelation(n_features=3, n_positions=16, max_lag=4)
    accumulator.update(features)
    torch.testing.assert_close(
        accumulator.compute().float(), tcsae.metrics.autocorrelation(features, 4).float()
    )
    accumulator.reset()
    accumulator.update(features[:2])
    torch.testing.assert_close(
        accumulator.compute().float(), tcsae.metrics.autocorrelation(features[:2], 4).float()
    )


def test_the_menu_needs_no_torch() -> None:
    """--help and --cfg answer without the libraries that take seconds to import."""
    code = (
        "import sys; sys.argv = ['train', '--cfg', 'job']; from tcsae.train import main; main();"
        "assert not {'torch', 'transformers', 'wandb', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            "tcsae.config.sae, tcsae.launch.plan, hydra_plugins.tcsae_launchers",
            {"torch", "numpy", "transformers", "wandb", "sklearn"},
        ),
        (
            "tcsae.metrics, tcsae.consistency",
            {"hydra", "wandb", "transformers", "tcsae.config", "tcsae.data"},
        ),
    ],
    ids=["configs and the plan of a sweep need no torch", "metrics know tensors and nothing else"],
)
def test_an_import_stays_light(modules: str, heavy: set[str]) -> None:
    code = f"import sys, {modules}; found = {heavy} & set(sys.modules); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
