"""The study of an adaptive sweep without any training: what is chosen, kept, and done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import small_config
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path

from tcsae.base.errors import UserError
from tcsae.config import number_options
from tcsae.config.folder import conf_folder
from tcsae.launch import study as studies
from tcsae.launch.objective import OF_TRUTH, constraint_of, full_key
from tcsae.launch.search_space import Space, space_of
from tcsae.metrics.truth import MEANS, OF_RUNS

ABOUT = {"objective": "y"}


@pytest.fixture(scope="module")
def loader() -> Any:
    number_options.install()
    return ConfigLoaderImpl(create_config_search_path(f"file://{conf_folder()}"))


@pytest.fixture(scope="module")
def space(loader: Any) -> Space:
    return space_of(["lambda=tag(log,interval(0.01,10))", "window=choice(2,4,8)", "seed=1"], loader)


def searched(folder: Path, space: Space, n_trials: int, n_jobs: int = 4) -> list[Any]:
    """Largest near lambda = .3 and window = 4; lambda may be .2 at most."""
    with studies.study_in(folder, "maximize", ABOUT) as study:
        studies.again(study)
        while (left := n_trials - len(studies.latest(study))) > 0:
            studies.seed_sampler(study, 0)
            trials = [(t := study.ask(), space.point(t)) for _ in range(min(left, n_jobs))]
            for trial, point in trials:
                trial.set_user_attr("overrides", point)
                weight = float(point[1].removeprefix("lambda="))
                value = -((weight - 0.3) ** 2) - (point[2] != "window=4")
                studies.tell(study, trial, value, {"lambda": weight - 0.2})
        return studies.latest(study)


def test_the_search_finds_the_best_that_keeps_to_the_constraint(
    space: Space, tmp_path: Path
) -> None:
    trials = searched(tmp_path, space, 32)
    best = studies.best_of(trials, "maximize")
    assert best is not None and len(trials) == 32
    assert best.params["window"] == "4" and 0.12 < best.params["lambda"] <= 0.2
    # It has learned: of the last points more are near than of the first, which are drawn by chance.
    near = [t.params["window"] == "4" and 0.05 < t.params["lambda"] < 0.5 for t in trials]
    assert sum(near[-8:]) > sum(near[:8])


def test_a_search_that_was_continued_chooses_the_same_points(space: Space, tmp_path: Path) -> None:
    whole = searched(tmp_path / "whole", space, 16)
    for n in (4, 12, 16):
        parts = searched(tmp_path / "parts", space, n)
    assert [t.params for t in parts] == [t.params for t in whole]
    assert len({str(t.params) for t in whole}) == 16


def test_points_that_failed_or_were_stopped_come_again_once(space: Space, tmp_path: Path) -> None:
    with studies.study_in(tmp_path, "maximize", ABOUT) as study:
        failed, stopped, hopeless = (study.ask() for _ in range(3))
        points = [space.point(trial) for trial in (failed, stopped, hopeless)]
        studies.tell_none(study, failed, None)
        studies.tell_none(study, hopeless, "no value")
    for _ in range(2):  # a second command that ends before it asked
        with studies.study_in(tmp_path, "maximize", ABOUT) as study:
            studies.again(study)
            assert len(studies.latest(study)) == 3
            assert [t.state.name for t in study.trials].count("WAITING") == 2
    with studies.study_in(tmp_path, "maximize", ABOUT) as study:
        trials = [study.ask() for _ in range(2)]
        assert sorted(map(space.point, trials)) == sorted(points[:2])
        for trial in trials:
            studies.tell(study, trial, 1.0, {})
        assert studies.again(study) == 0
        assert sorted(t.state.name for t in studies.latest(study)) == [*["COMPLETE"] * 2, "FAIL"]


def test_a_file_that_is_no_study_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "study.jsonl").write_bytes(b"\x80\x04K\x01.\n")  # a pickle, say
    with (
        pytest.raises(UserError, match="Optuna cannot read it .*; move it away"),
        studies.study_in(tmp_path, "maximize", ABOUT),
    ):
        pass


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("int(interval(2,9))", {"2", "9"}),
        ("interval(0.5,1.25)", {"0.5", "1.25"}),
        ("range(2,9,2)", {"2", "8"}),
        ("range(0.5,2,0.5)", {"0.5", "1.5"}),
        ("4,8,16", {"4", "16"}),
    ],
)
def test_the_ends_of_an_axis_are_as_hydra_has_them(
    written: str, values: set[str], loader: Any
) -> None:
    (axis,) = space_of([f"sae.k={written}"], loader).axes
    assert set(axis.ends) == values
    study = studies.study_in_memory("maximize")
    for _ in range(8):
        value = float(axis.chosen(study.ask()))
        assert min(map(float, values)) <= value <= max(map(float, values))


@pytest.mark.parametrize(
    ("written", "value", "excess"),
    [
        (">=0.8", 0.75, 0.05),
        ("<= 40", 30, -10),
        (">=baseline-0.01", 0.88, 0.01),
        ("<=baseline + 5", 6.0, 0.1),
        (">=baseline", 0.9, 0.0),
        (">=-1e-3", 0.0, -1e-3),
    ],
)
def test_constraints(written: str, value: float, excess: float) -> None:
    assert constraint_of("x", written, "c").excess(value, 0.9) == pytest.approx(excess)


@pytest.mark.parametrize("written", ["0.8", ">0.8", ">=", "<=baseline-", ">=baseline 1", ">=x"])
def test_what_is_no_constraint(written: str) -> None:
    with pytest.raises(UserError, match="write >=NUMBER"):
        constraint_of("x", written, "hydra.sweeper.constraints.x")


@pytest.fixture(scope="module")
def config() -> Any:
    return small_config(Path("weights"), Path("texts"), window="4")


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("L_2", "consistency.metrics.L_2.energy_weighted"),
        ("L_W", "consistency.metrics.L_W.energy_weighted"),
        ("L_2.median", "consistency.metrics.L_2.median"),
        ("consistency.metrics.omega_squared", "consistency.metrics.omega_squared.energy_weighted"),
        ("l0", "metrics.sparsity.l0"),
        ("live_share", "consistency.live_share.value"),
        ("metrics.reconstruction_quality.mse", "metrics.reconstruction_quality.mse"),
        ("final_loss", "final_loss"),
    ],
)
def test_a_key_may_be_given_by_its_end(written: str, key: str, config: Any) -> None:
    assert full_key(written, config, "o") == key


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("explained_varance", "final_info.json will have no .*; did you mean explained_variance"),
        ("L_6", "final_info.json will have no L_6; did you mean L_"),
        ("omega", "did you mean omega_squared"),
        ("truth.mcc", "final_info.json will have no truth.mcc"),
        ("meaning.probe_semantics.value", "will have no meaning"),
        ("sae_id", "sae_id of final_info.json is not a number"),
        ("metrics.sparsity", "metrics.sparsity of final_info.json is not a number"),
        ("energy_weighted", "is the end of several keys: consistency"),
    ],
)
def test_a_key_that_is_no_number_is_refused_with_near_ones(
    written: str, said: str, config: Any
) -> None:
    with pytest.raises(UserError, match=f"^o: .*{said}"):
        full_key(written, config, "o")


def test_the_numbers_of_a_world_are_those_that_truth_has() -> None:
    assert (*MEANS, *OF_RUNS) == OF_TRUTH
