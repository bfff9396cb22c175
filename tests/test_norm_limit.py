"""The norm limit of a run: its default, its presets, and what its results say of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_config

from tcsae.base.files import read_json
from tcsae.base.signals import StopRequest
from tcsae.config import DatasetConfig
from tcsae.config.compose import config_of as composed
from tcsae.config.folder import conf_folder
from tcsae.data.stream import open_stream
from tcsae.jobs.bank import run
from tcsae.metrics.norm_limits import NOT_ENCODED

PRESETS = sorted(path.stem for path in (conf_folder() / "experiment").glob("*.yaml"))
DATASETS = sorted(path.stem for path in (conf_folder() / "dataset").glob("*.yaml"))


def test_the_default_is_3_whatever_the_text() -> None:
    assert DatasetConfig.model_fields["norm_filter"].default == 3
    assert {"shakespeare", "files"} <= set(DATASETS)
    for dataset in DATASETS:
        there = ["dataset.path=there"]
        more = {"files": there, "activations": there, "synthetic": ["model=synthetic"]}
        assert composed(f"dataset={dataset}", *more.get(dataset, [])).dataset.norm_filter == 3


@pytest.mark.parametrize("preset", PRESETS)
def test_only_presets_of_published_runs_keep_their_limit(preset: str) -> None:
    published = preset == "prior_art" or preset.startswith("study")
    found = composed(f"+experiment={preset}").dataset.norm_filter
    assert found == (10 if published else 3)


def test_a_batch_knows_what_is_special_beside_what_is_massive(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    config = small_config(
        tiny_gpt2, texts, store__dir=str(tmp_path), layer="1", dataset__norm_filter="1.05"
    )
    stream = open_stream(config, StopRequest())
    batch = stream.train.batch(torch.arange(16))
    assert torch.equal(batch.not_special, stream.train.source.contexts.valid[:16])
    assert not batch.not_special[:, 0].any()
    massive = batch.not_special & ~batch.valid
    assert massive.any() and not (batch.valid & ~batch.not_special).any()
    limit = stream.train.calibration.norm_limit
    assert torch.equal(massive, batch.not_special & (batch.x.norm(dim=-1) > limit))


@pytest.mark.parametrize("architecture", ["topk", "persistent", "tfa"])
def test_a_run_reports_every_limit(
    architecture: str,
    tiny_gpt2: Path,
    texts: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At a limit that leaves many tokens out, which the tiny model's norms need."""
    config = small_config(
        tiny_gpt2,
        texts,
        store__dir=str(tmp_path / "store"),
        layer="1",
        sae=architecture,
        sae__k="8",
        dataset__norm_filter="1.05",
        **({"sae__n_heads": "4", "sae__bottleneck_factor": "4"} if architecture == "tfa" else {}),
    )
    with caplog.at_level(logging.INFO, logger="tcsae"):
        info = run(config, tmp_path / "run")
    core = read_json(tmp_path / "run" / "eval" / "core.json")
    extras = core["eval_result_unstructured"]
    rows = extras["explained_variance_by_norm_limit"]
    assert info["explained_variance_by_norm_limit"] == rows
    assert [row["limit"] for row in rows] == [1.05, 2, 3, 5, 10, None]
    headline = core["eval_result_metrics"]["reconstruction_quality"]["explained_variance"]
    assert rows[0]["explained_variance"] == pytest.approx(headline, rel=1e-9)
    assert rows[0]["n_tokens_left_out"] > 0 and rows[-1]["n_tokens_left_out"] == 0
    if architecture == "topk":
        assert all(row["reason"] is None for row in rows)
    else:
        # It keeps massive tokens from its codes: there is no reconstruction to measure.
        assert {row["reason"] for row in rows[1:]} == {NOT_ENCODED}
        assert extras["norm_limit_caution"] is None
    said = extras["norm_limit_caution"]
    warned = [r.getMessage() for r in caplog.records if "norm limit" in r.getMessage()]
    assert warned == ([said["text"]] if said else [])


@pytest.mark.parametrize(("decides", "level"), [(True, "WARNING"), (False, "INFO")])
def test_the_terminal_warns_only_of_the_runs_own_number(
    decides: bool, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    from types import SimpleNamespace

    from tcsae.jobs.finish import say_norm_limit

    said = {"decides_the_headline": decides, "limits": [5], "text": "told"}
    core = {"eval_result_unstructured": {"norm_limit_caution": said}}
    evaluation: Any = SimpleNamespace(core=core)
    with caplog.at_level(logging.INFO, logger="tcsae"):
        say_norm_limit(evaluation)
    assert [r.levelname for r in caplog.records if r.getMessage() == "told"] == [level]
