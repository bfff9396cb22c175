"""The default run, on the real embedded model and text, and what it must reach. The long tests."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import tcsae
from tcsae.base.signals import StopRequest
from tcsae.config.folder import conf_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with a cache and a store of its own."""
    folder = tmp_path_factory.mktemp("embedded")
    return {**os.environ, "TCSAE_STORE": str(folder / "store"), "HF_HUB_OFFLINE": "1"}


def train(environment: dict[str, str], folder: Path, *overrides: str) -> int:
    """Trains, and gives the most memory that this one process held, in kilobytes.

    RUSAGE_CHILDREN would be the most of every child that this test worker ever had.
    """
    command = [sys.executable, "-m", "tcsae.train", f"hydra.run.dir={folder}", *overrides]
    process = subprocess.Popen(command, env=environment)
    watch = threading.Timer(3000, process.kill)
    watch.start()
    _, status, usage = os.wait4(process.pid, 0)
    watch.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss


@pytest.fixture(scope="session")
def default_run_and_memory(
    home: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("runs") / "default"
    return folder, train(home, folder)


@pytest.fixture(scope="session")
def default_run(default_run_and_memory: tuple[Path, int]) -> Path:
    return default_run_and_memory[0]


SHORT = ("training.tokens=500000", "evaluation.model_contexts=16", "evaluation.analysis=false")
WANTED = "lambda=0.3 sae=standard training.target_l0=32"


@pytest.fixture(scope="session")
def ablation(
    home: dict[str, str], default_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The preset first_look, shorter: one process, on the default run's activations.

    Of its four jobs the weight between 0 and 1 shows nothing that is tested: in its place stands an
    SAE that is to reach an L0. Side by side, jobs have the weights that each would have alone.
    """
    folder = tmp_path_factory.mktemp("ablation") / "sweep"
    preset = OmegaConf.load(conf_folder() / "experiment" / "first_look.yaml")
    weights, control = preset.hydra.sweeper.points
    assert weights == "lambda=0,0.3,1"
    points = json.dumps([weights.replace(",0.3", ""), control, WANTED])
    arguments = ["+experiment=first_look", *SHORT, f"hydra.sweep.dir={folder}"]
    command = [sys.executable, "-m", "tcsae.train", *arguments, f"hydra.sweeper.points={points}"]
    subprocess.run(command, env=home, check=True, timeout=3000)
    jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
    infos = [folder / job["folder"] / "final_info.json" for job in jobs]
    return {job["name"]: json.loads(i.read_text()) for job, i in zip(jobs, infos, strict=True)}


def test_default_run_reaches_what_the_readme_promises(default_run: Path) -> None:
    info = json.loads((default_run / "final_info.json").read_text())
    groups = info["metrics"]
    assert groups["reconstruction_quality"]["explained_variance"] >= 0.78
    assert groups["misc_metrics"]["frac_alive"] >= 0.90
    assert groups["model_performance_preservation"]["ce_loss_score"] >= 0.80
    assert groups["sparsity"]["l0"] == pytest.approx(32, abs=0.5)


def test_default_run_lies_in_the_intervals_that_the_readme_prints(default_run: Path) -> None:
    """The second of the pair is the default run; README says what it came to, with intervals."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    block = text.split("<!-- first run: begin -->")[1].split("<!-- first run: end -->")[0]
    printed = block.rpartition("held-out results:")[2]
    metrics = json.loads((default_run / "final_info.json").read_text())["consistency"]["metrics"]
    for said, name in (
        ("window consistency C_8", "C_8"),
        ("local consistency L_8", "L_8"),
        ("autocorrelation rho_1", "rho_1"),
        (r"position share omega\^2", "omega_squared"),
    ):
        found = re.search(rf"{said} +[\d.]+ +\[([\d.]+), ([\d.]+)\]", printed)
        assert found is not None, said
        value = metrics[name]["energy_weighted"]
        # Another processor rounds otherwise: half a unit of the last digit printed is no miss.
        assert float(found[1]) - 5e-4 <= value <= float(found[2]) + 5e-4, (name, value, found[0])


def test_default_run_fits_into_4_gigabytes(default_run_and_memory: tuple[Path, int]) -> None:
    assert 0.5 * 1024**2 < default_run_and_memory[1] < 4 * 1024**2


def test_steps_and_tokens_are_those_that_happened(default_run: Path) -> None:
    run = tcsae.load_run(default_run)
    assert run.final_info["training_steps"] == run.config.steps > 0
    assert run.metrics[-1]["step"] == run.config.steps
    seen = run.config.steps * run.config.training.batch_contexts * 128
    assert 0.95 * seen < run.final_info["tokens"] < seen
    assert run.metrics[-1]["loss/total"] == pytest.approx(run.final_info["final_loss"])


def test_zero_ablation_leaves_uniform_logits(default_run: Path) -> None:
    groups = tcsae.load_run(default_run).final_info["metrics"]
    ablated = groups["model_performance_preservation"]["ce_loss_with_ablation"]
    assert ablated == pytest.approx(math.log(49152), abs=2e-3)


def test_the_model_predicts_real_prose(default_run: Path) -> None:
    groups = tcsae.load_run(default_run).final_info["metrics"]
    clean = groups["model_performance_preservation"]["ce_loss_without_sae"]
    assert 3.0 < clean < 4.5  # Shakespeare; a wrongly packed or tokenised text gives 5 and more


def test_massive_tokens_are_few_and_left_out(default_run: Path) -> None:
    share = tcsae.load_run(default_run).final_info["massive_token_share"]
    assert 0 < share < 0.01


def test_the_norm_limit_lies_in_the_gap(default_run: Path) -> None:
    """Nothing changes from 2 to 5 medians; without a limit massive tokens make the number."""
    info = tcsae.load_run(default_run).final_info
    rows = {row["limit"]: row for row in info["explained_variance_by_norm_limit"]}
    headline = info["metrics"]["reconstruction_quality"]["explained_variance"]
    assert rows[3]["explained_variance"] == pytest.approx(headline, rel=1e-9)
    for limit in (2, 5):
        assert rows[limit]["explained_variance"] == pytest.approx(headline, abs=0.01)
    assert rows[3]["token_share_left_out"] < 0.01 and rows[3]["variance_share_left_out"] > 0.9


def test_saved_sae_gives_what_the_evaluation_measured(
    default_run: Path, home: dict[str, str]
) -> None:
    """Reload everything from files and measure again, by other means."""
    from tcsae.data.batches import ActivationBatches, calibrate
    from tcsae.data.context_cache import load_or_build_contexts
    from tcsae.data.language_model import LanguageModel
    from tcsae.data.store import ActivationStore

    run = tcsae.load_run(default_run)
    root = Path(home["TCSAE_STORE"])
    model = LanguageModel(run.config.model, run.config.layer)
    train_contexts, held_out = load_or_build_contexts(
        run.config.dataset, model, root, StopRequest()
    )
    shards = run.config.store.shard_contexts
    store = ActivationStore(root, model, held_out, shards)
    assert store.missing() == []
    source = ActivationStore(root, model, train_contexts, shards)
    calibration = calibrate(source, run.config.dataset.norm_filter)
    batch = ActivationBatches(store, calibration, "cpu").batch(torch.arange(len(held_out.ids)))
    x = batch.x[batch.valid].double()
    error = x - tcsae.load_sae(default_run)(x.float()).double()
    explained = 1 - error.square().sum() / (x - x.mean(0)).square().sum()
    measured = run.final_info["metrics"]["reconstruction_quality"]["explained_variance"]
    assert explained.item() == pytest.approx(measured, abs=1e-4)


def test_training_and_held_out_plays_are_disjoint(default_run: Path, home: dict[str, str]) -> None:
    from tcsae.data.context_cache import load_or_build_contexts
    from tcsae.data.language_model import LanguageModel

    run = tcsae.load_run(default_run)
    root = Path(home["TCSAE_STORE"])
    model = LanguageModel(run.config.model, run.config.layer)
    parts = load_or_build_contexts(run.config.dataset, model, root, StopRequest())
    assert parts[0].groups and parts[1].groups
    assert not set(parts[0].groups) & set(parts[1].groups)


def consistency_8(info: dict[str, Any]) -> tuple[float, float, float]:
    entry = info["consistency"]["metrics"]["C_8"]
    return entry["energy_weighted"], *entry["energy_weighted_interval"]


def test_lambda_1_raises_consistency_at_little_cost(ablation: dict[str, dict[str, Any]]) -> None:
    """In this short run 1.76 times at .005 less explained variance; the first version of the loss
    doubled it, and paid four times as much (docs/effect.md has both, at full length)."""
    none, strong = ablation["lambda=0"], ablation["lambda=1"]
    value_0, _, high_0 = consistency_8(none)
    value_1, low_1, _ = consistency_8(strong)
    assert value_1 >= 1.5 * value_0
    assert low_1 > high_0, "the intervals are apart"
    for group, key in (("reconstruction_quality", "explained_variance"), ("shrinkage", "l2_ratio")):
        assert strong["metrics"][group][key] >= none["metrics"][group][key] - 0.01, key


def test_the_shuffled_control_does_not(ablation: dict[str, dict[str, Any]]) -> None:
    control = ablation["lambda=1,consistency=shuffled"]
    assert consistency_8(control)[0] < 0.75 * consistency_8(ablation["lambda=1"])[0]


def test_a_wanted_l0_is_reached_within_5_percent(ablation: dict[str, dict[str, Any]]) -> None:
    """In a third of the default's steps; the L1 coefficient is not tuned for it."""
    info = ablation[WANTED.replace(" ", ",")]
    assert info["metrics"]["sparsity"]["l0"] == pytest.approx(32, rel=0.05)


def test_the_store_was_filled_once(ablation: dict[str, dict[str, Any]], home: Any) -> None:
    assert len(list((Path(home["TCSAE_STORE"]) / "activations").iterdir())) == 2  # train, held-out
