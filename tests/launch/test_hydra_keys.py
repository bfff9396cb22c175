"""Hydra's own keys, in one run and in a sweep: each is obeyed or refused in one line.

What refuses needs no run: it is asked of the composed configuration. What is obeyed shows in what a
dry run says, in the jobs that a launcher composes, or in what Hydra prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from tcsae.base.errors import UserError
from tcsae.config.arguments import arranged
from tcsae.config.compose import prepare_hydra
from tcsae.config.folder import conf_folder
from tcsae.config.mistakes import for_the_user
from tcsae.launch import hydra_keys
from tcsae.launch.launcher import GridLauncher, Packs
from tcsae.launch.sweep_folder import SweepFolder


class Hearing(Callback):
    """A callback that wants to hear of single jobs."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Not called in a sweep."""


class OfTheSweep(Callback):
    """A callback that hears of the whole sweep alone."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Hydra calls it."""


@pytest.fixture(scope="module")
def loader() -> Iterator[Any]:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    prepare_hydra()
    from tcsae.train import _run_name

    OmegaConf.register_new_resolver("tcsae.run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("tcsae.sweep_name", lambda: "sweep", replace=True)
    yield ConfigLoaderImpl(create_config_search_path(f"file://{conf_folder()}"))
    for name in ("run_name", "sweep_name"):
        OmegaConf.clear_resolver(f"tcsae.{name}")
    GlobalHydra.instance().clear()


@pytest.fixture
def master(loader: Any) -> Callable[..., DictConfig]:
    """What Hydra composes of a command line before it begins."""

    def compose(*overrides: str, mode: RunMode = RunMode.MULTIRUN) -> DictConfig:
        config = loader.load_configuration("train", list(overrides), mode)
        HydraConfig.instance().set_config(config)
        return config

    return compose


# ------------------------------------------------------------------------------------ one run


@pytest.mark.parametrize(
    "override",
    [
        "hydra/launcher=slurm",
        "hydra/launcher=local",
        "hydra.launcher.pack=2",
        "hydra/sweeper=basic",
        "hydra.sweeper.max_batch_size=1",
        "+hydra.sweeper.params.seed='0,1'",
        "hydra.sweep.dir=there",
        "hydra.sweep.subdir=there",
    ],
)
def test_what_is_of_a_sweep_is_refused_for_one_run(
    override: str, master: Callable[..., DictConfig]
) -> None:
    with pytest.raises(UserError, match="does nothing for one run") as refused:
        hydra_keys.refuse_of_one_run(master(override, mode=RunMode.RUN).hydra)
    assert str(refused.value).startswith(override) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "hydra.run.dir=there",
        "hydra.job.chdir=true",
        "hydra.job.name=mine",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        "hydra.verbose=true",
        "+hydra.job.env_set.A=1",
        "hydra/launcher=slurm hydra.launcher.dry_run=true",
    ],
)
def test_what_is_hydras_own_is_taken_for_one_run(
    override: str, master: Callable[..., DictConfig]
) -> None:
    hydra_keys.refuse_of_one_run(master(*override.split(), mode=RunMode.RUN).hydra)


def test_a_launcher_that_a_file_chose_is_refused_for_one_run_too(
    master: Callable[..., DictConfig],
) -> None:
    hydra = master("hydra/launcher=slurm", mode=RunMode.RUN).hydra
    with read_write(hydra):
        hydra.overrides.hydra = []
    with pytest.raises(UserError, match="hydra/launcher=slurm: it does nothing for one run"):
        hydra_keys.refuse_of_one_run(hydra)


# ------------------------------------------------------------------------------------ a sweep


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hydra.run.dir=there", "lie in hydra.sweep.dir"),
        ("hydra.job.chdir=true", "share a process"),
        ("hydra.job.name=mine", "is train.log"),
        ("hydra.output_subdir=mine", "must be .hydra or null"),
        ("hydra/job_logging=disabled", "log into train.log"),
        ("hydra.job_logging.root.level=DEBUG", "log into train.log"),
        ("hydra.verbose=true", "run one of them alone"),
        (f"+hydra.callbacks.x._target_={__name__}.Hearing", "on_job_start is not called"),
        (
            "+hydra.callbacks.x._target_=hydra.experimental.callbacks.LogJobReturnCallback",
            "on_job_end is not called",
        ),
    ],
)
def test_what_the_jobs_of_a_sweep_would_not_heed_is_refused(
    override: str, words: str, master: Callable[..., DictConfig]
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        hydra_keys.refuse_of_a_sweep(master(override).hydra)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "override",
    [
        "hydra.sweep.dir=there",
        "hydra.run.dir=here hydra.sweep.dir=there",
        "hydra.sweep.subdir=${hydra.job.override_dirname}",
        "hydra.output_subdir=null",
        "hydra.launcher.pack=2",
        "+hydra.job.env_set.A=1",
        "hydra.job.env_copy=[PATH]",
        "hydra/hydra_logging=disabled",
        f"+hydra.callbacks.x._target_={__name__}.OfTheSweep",
    ],
)
def test_what_is_of_a_sweep_is_taken(override: str, master: Callable[..., DictConfig]) -> None:
    hydra_keys.refuse_of_a_sweep(master(*override.split()).hydra)


def test_what_a_dry_run_adds_itself_is_not_refused(master: Callable[..., DictConfig]) -> None:
    dry = ("hydra.launcher.dry_run=true", *hydra_keys.WRITE_NOTHING)
    hydra_keys.refuse_of_a_sweep(master(*dry).hydra)
    with pytest.raises(UserError, match="lie in hydra.sweep.dir"):
        hydra_keys.refuse_of_a_sweep(master(*dry, "hydra.run.dir=there").hydra)


class Composing(GridLauncher):
    """A launcher that composes its jobs and runs none."""

    kind = "here"

    @property
    def options(self) -> Any:
        from tcsae.config.launcher import Options

        return Options(dry_run=True)

    def processes(self) -> int | None:
        return 1

    def execute(self, sweep: SweepFolder, packs: Packs) -> dict[int, str]:
        raise AssertionError("a dry run runs nothing")


@pytest.fixture
def launcher(loader: Any, master: Callable[..., DictConfig]) -> Callable[..., Composing]:
    def make(*overrides: str) -> Composing:
        made = Composing()
        context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
        made.setup(hydra_context=context, task_function=lambda _: None, config=master(*overrides))
        return made

    return make


SEEDS: Sequence[Sequence[str]] = [["seed=0"], ["seed=1"]]


def test_jobs_have_the_folders_that_are_asked_for(
    launcher: Callable[..., Composing], tmp_path: Path
) -> None:
    place = (f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=a/${hydra.job.override_dirname}")
    jobs = launcher(*place).compose(SEEDS, 0)
    assert [job.folder for job in jobs] == [tmp_path / "a" / f"seed={seed}" for seed in (0, 1)]
    by_number = launcher(place[0], "hydra.sweep.subdir=${hydra.job.num}").compose(SEEDS, 0)
    assert [job.folder.name for job in by_number] == ["0", "1"]


def test_two_runs_in_one_folder_are_refused_and_none_is_dropped(
    launcher: Callable[..., Composing], tmp_path: Path
) -> None:
    made = launcher(f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=same")
    with pytest.raises(UserError, match=r"jobs 0 \(seed=0\) and 1 \(seed=1\) one folder, same"):
        made.compose(SEEDS, 0)
    # The same run twice is one job.
    assert len(made.compose([["seed=0"], ["seed=0", "name=x"]], 0)) == 2


def test_a_job_has_hydras_files_unless_none_are_wanted(
    launcher: Callable[..., Composing], tmp_path: Path
) -> None:
    with_files = launcher(f"hydra.sweep.dir={tmp_path}").compose(SEEDS, 0)
    assert set(with_files[0].hydra_files) == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    made = launcher(f"hydra.sweep.dir={tmp_path}", "hydra.output_subdir=null")
    assert all(job.hydra_files == {} for job in made.compose(SEEDS, 0))


def test_the_environment_is_set_before_the_jobs_are_composed(
    launcher: Callable[..., Composing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCSAE_STORE", "other")
    made = launcher(f"hydra.sweep.dir={tmp_path}", "+hydra.job.env_set.TCSAE_STORE=mine")
    hydra_keys.set_environment(made.config.hydra)  # type: ignore[union-attr]
    assert os.environ["TCSAE_STORE"] == "mine"
    assert made.compose(SEEDS[:1], 0)[0].config.store.dir == "mine"


@pytest.mark.parametrize(
    "own", ["hydra.launcher.pack=1", "+hydra.job.env_set.A=1", "hydra.sweep.dir=x"]
)
def test_what_belongs_to_the_sweep_is_no_jobs(
    own: str, launcher: Callable[..., Composing], tmp_path: Path
) -> None:
    made = launcher(f"hydra.sweep.dir={tmp_path}")
    with pytest.raises(UserError, match="which belongs to the whole sweep"):
        made.compose([["seed=0", own]], 0)


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("seed=0,1", ["0", "1"]),
        ("seed=range(0,3)", ["0", "1", "2"]),
        ("seed=choice(3,5)", ["3", "5"]),
        ("seed=sort(5,3)", ["3", "5"]),
        ("seed=sort(3,5,reverse=true)", ["5", "3"]),
        ("seed=tag(a,b,choice(1,2))", ["1", "2"]),
        ("sae=glob(t*k)", ["topk"]),
        ("sae=glob(*,exclude=[b*,g*,j*,m*,p*,s*])", ["tfa", "topk", "tsae"]),
        ("+tracking.note='a,b'", ["'a,b'"]),
        ("~tracking.tags", ["null"]),
        ("++seed=1,2", ["1", "2"]),
        ("tracking.tags=[a,b],[c]", ["[a,b]", "[c]"]),
    ],
)
def test_the_grammar_of_overrides_is_hydras(override: str, values: list[str], loader: Any) -> None:
    from tcsae.launch.sweeper import GridSweeper

    sweeper = GridSweeper()
    sweeper.context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
    key = override.partition("=")[0]
    assert [job[0] for job in sweeper.grid([override])] == [f"{key}={value}" for value in values]


def test_shuffle_has_every_value_once(loader: Any) -> None:
    from tcsae.launch.sweeper import GridSweeper

    sweeper = GridSweeper()
    sweeper.context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
    grid = sweeper.grid(["seed=shuffle(range(0,6))"])
    assert sorted(job[0] for job in grid) == [f"seed={seed}" for seed in range(6)]


def test_an_interval_is_refused_in_one_line(loader: Any) -> None:
    from tcsae.launch.sweeper import GridSweeper

    sweeper = GridSweeper()
    sweeper.context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
    with pytest.raises(HydraException) as refused:
        sweeper.grid(["training.lr=interval(0.001,0.01)"])
    line = for_the_user(refused.value)
    assert line is not None and "interval" in line.lower() and "\n" not in line


# ----------------------------------------------------------------------------- Hydra's flags


def said(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `python -m tcsae.train` prints with Hydra's own flags, which run nothing."""
    from tcsae import train

    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    GlobalHydra.instance().clear()
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        train.main()
    return out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cfg", "job", "--package", "sae.k"], "32"),
        (["--cfg", "job", "--resolve"], "layer: 15"),
        (["--cfg", "hydra"], "tcsae_launchers.GridSweeper"),
        (["--cfg", "all"], "hydra:"),
        (["--info", "searchpath"], "number://layer,window,lambda"),
        (["--info", "defaults"], "sae/topk"),
        (["--help"], "flags may stand before and after"),
        (["--hydra-help"], "--experimental-rerun"),
        (["--shell-completion", "install=bash"], "hydra_bash_completion"),
        (["--config-name", "mine", "--config-dir", "HERE", "--cfg", "job"], "seed: 7"),
        (["hydra.searchpath=[file://HERE]", "sae=mine", "--cfg", "job"], "d_sae: 64"),
        (["hydra.searchpath=[file://HERE]", "window=12", "--cfg", "job"], "window: 12"),
    ],
)
def test_hydras_flags_do_what_its_manual_says(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\nseed: 7\n")
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [topk, _self_]\nsae: {d_sae: 64}\n"
    )
    placed = [argument.replace("HERE", str(tmp_path)) for argument in arguments]
    assert words in said(*placed, monkeypatch=monkeypatch)


def test_a_pickled_configuration_is_not_read() -> None:
    with pytest.raises(HydraException, match="pickled") as refused:
        arranged(["--experimental-rerun", "run/.hydra/config.pickle"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("hydra.sweeper.params={seed:'0,1'}", "+hydra.sweeper.params.NAME=VALUE"),
        ("hydra.job.env_set.A=1", "+hydra.job.env_set.NAME=VALUE"),
    ],
)
def test_how_a_key_of_the_users_own_is_added_is_said(
    override: str, hint: str, master: Callable[..., DictConfig]
) -> None:
    with pytest.raises(Exception) as raised:
        master(override)
    line = for_the_user(raised.value)
    assert line is not None and hint in line and "\n" not in line
