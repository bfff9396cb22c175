"""What the page's script is given is what the run's files say."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tcsae.report.contents import Contents, binned
from tcsae.report.runs import flat
from tcsae.runs.folder import load_run


@pytest.fixture(scope="module")
def contents(run_folder: Path) -> Contents:
    return Contents.of(load_run(run_folder))


@given(
    arrays(np.float64, (23, 2), elements=st.one_of(st.floats(0, 1), st.just(np.nan))),
    st.integers(1, 30),
)
def test_bins_are_means_over_their_positions(profile: np.ndarray, n_bins: int) -> None:
    positions, found = binned(profile, n_bins)
    if n_bins >= 23:
        assert found is profile
        return
    edges = np.linspace(0, 23, n_bins + 1).round().astype(int)
    for i, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        assert positions[i] == (start + end - 1) / 2
        for column in range(2):
            known = [v for v in profile[start:end, column] if v == v]
            want = sum(known) / len(known) if known else np.nan
            assert found[i, column] == pytest.approx(want, nan_ok=True)


def test_the_loss_s_own_window_comes_first(contents: Contents) -> None:
    assert contents.window_metric == "C_4"
    other = contents.run.config.model_copy(update={"window": "document"})
    elsewhere = dataclasses.replace(contents.run, config=other)
    assert dataclasses.replace(contents, run=elsewhere).window_metric == "C_4"


def test_the_command_is_the_one_that_was_given(contents: Contents, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(contents.run.folder, folder)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("- lambda=0.3\n- name='two words'\n")
    command = Contents.of(load_run(folder)).command()
    assert shlex.split(command) == [
        *("python", "-m", "tcsae.train"),
        *("lambda=0.3", "name='two words'"),
    ]


def test_a_job_of_an_experiment_is_repeated_alone(contents: Contents, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(contents.run.folder, folder)
    (folder / ".hydra").mkdir()
    record = "- lambda=0.3\n- +experiment=lambda_ablation\n"
    (folder / ".hydra" / "overrides.yaml").write_text(record)
    command = Contents.of(load_run(folder)).command()
    assert shlex.split(command)[3:] == [
        *("lambda=0.3", "+experiment=lambda_ablation", "hydra.mode=RUN")
    ]


def test_without_a_record_the_command_spells_the_config_out(contents: Contents) -> None:
    from tcsae.config.compose import config_of

    again = config_of(*shlex.split(contents.command())[3:])
    assert again == contents.run.config
    assert dict(flat(again.dump()))["dataset.context_size"] == 16


def test_what_is_missing_is_said_with_its_reason(contents: Contents, tmp_path: Path) -> None:
    # Two model contexts of 4: the intervals of CE and KL are missing, not the values.
    assert not [line for line in contents.missing() if line.startswith("CE loss")]
    summary = {**contents.summary, "windows_left_out": {"64": "needs lags up to 63"}}
    core = {**contents.run.core}
    groups = core["eval_result_metrics"]
    core["eval_result_metrics"] = {**groups, "sparsity": {"l0": None, "l1": 1.0}}
    core["eval_result_unstructured"] = {
        **core["eval_result_unstructured"],
        "missing": {"eval_result_metrics.sparsity.l0": "no valid token was seen"},
    }
    run = dataclasses.replace(contents.run, core=core, consistency={"summary": summary})
    said = Contents(run, contents.values, None).missing()
    assert "L0: no valid token was seen" in said
    assert "Window consistency C_64: needs lags up to 63" in said
    assert any("no analysis/ folder" in line for line in said)
