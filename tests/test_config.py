"""conf/ and its schema: everything on the menu composes, every mistake is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tcsae.base.errors import UserError
from tcsae.config import (
    ConsistencyConfig,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    StoreConfig,
    TrackingConfig,
    TrainingConfig,
    identity,
    number_options,
    parse,
    parse_any,
    resolve_layer,
    run_id,
    run_name,
)
from tcsae.config.compose import config_of as config
from tcsae.config.folder import conf_folder
from tcsae.config.sae import architectures, config_class
from tcsae.report.runs import settings_of
from tcsae.train import _sweep_name

CONF = conf_folder()


def options() -> list[str]:
    found = []
    for file in sorted(CONF.glob("*/*.yaml")):
        group, name = file.parent.name, file.stem
        more = {
            "model/other": " model.name=x/y",
            "dataset/files": " dataset.path=x",
            "dataset/activations": " dataset.path=x",
            "model/activations": " dataset.path=x",
            "consistency/first_group": " sae=matryoshka",
            "dataset/synthetic": " model=synthetic",
            **{
                f"world/{world.stem}": " model=synthetic"
                for world in (CONF / "world").glob("*.yaml")
            },
        }
        prefix = "+" if group == "experiment" else ""
        found.append(f"{prefix}{group}={name}{more.get(f'{group}/{name}', '')}")
    return found


@pytest.mark.parametrize("override", options())
def test_every_option_of_every_group_composes_to_a_valid_config(override: str) -> None:
    assert config(*override.split()).steps > 0


def test_every_option_says_in_its_file_what_it_is() -> None:
    bare = {"window", "lambda"}  # plain numbers say it themselves
    for file in CONF.glob("*/*.yaml"):
        if file.parent.name not in bare:
            assert "# " in file.read_text().replace("# @package _global_", ""), file


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("window=16", "window", 16),
        ("window=12", "window", 12),
        ("window=document", "window", "document"),
        ("lambda=0", "lambda_", 0),
        ("lambda=1e-3", "lambda_", 0.001),
        ("lambda=.25", "lambda_", 0.25),
        ("lambda=0.05", "lambda_", 0.05),
        ("layer=19", "layer", 19),
        ("layer=0", "layer", 0),
        ("layer=middle", "layer", "middle"),
        ("layer=default", "layer", 15),
    ],
)
def test_numbers_and_names_are_options_alike(override: str, key: str, value: Any) -> None:
    assert getattr(config(override), key) == value


@settings(max_examples=50, deadline=None)
@given(st.floats(min_value=0, max_value=1e6))
def test_any_finite_number_is_an_option_of_lambda(value: float) -> None:
    assert config(f"lambda={value!r}").lambda_ == value


def test_hydra_is_the_release_whose_private_class_is_wrapped() -> None:
    import hydra
    from hydra._internal import defaults_list

    number_options.install()
    number_options.install()
    assert hydra.__version__.startswith("1.3.")
    assert defaults_list.Overrides._tcsae_numbers


def test_gemma_comes_with_the_settings_the_experiment_began_with() -> None:
    cfg = config("+experiment=seed_baseline", "model=gemma", "window=16", "lambda=0.2")
    assert (cfg.model.name, cfg.layer) == ("google/gemma-2-2b", 19)
    assert (cfg.sae.architecture, cfg.sae.d_sae) == ("standard", 2304)
    assert cfg.sae.l1_coefficient == 0.04  # type: ignore[attr-defined]
    assert cfg.training.lr == 3e-4
    assert (cfg.window, cfg.lambda_) == (16, 0.2)


def test_the_command_line_wins_over_what_a_model_brings() -> None:
    cfg = config("model=gemma", "sae=topk", "training.lr=1e-2", "layer=3")
    assert (cfg.sae.architecture, cfg.training.lr, cfg.layer) == ("topk", 1e-2, 3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("window=1", ["window = 1", "2 to 128", "document"]),
        ("window=200", ["window = 200", "2 to 128"]),
        ("window=8.5", ["window = 8.5", "whole number"]),
        ("lambda=-1", ["lambda = -1", "greater than or equal to 0"]),
        ("layer=99", ["layer = 99", "0 to 29"]),
        ("layer=-1", ["layer = -1", "0 to 29"]),
        ("sae.k=0", ["sae.k = 0"]),
        ("sae.k=5000", ["5000", "2304"]),
        ("sae.architecture=nosuch", ["sae", "standard", "topk"]),
        ("training.lr=fast", ["training.lr = fast", "number"]),
        ("training.tokens=0", ["training.tokens = 0"]),
        ("training.tokens=1.5", ["training.tokens = 1.5", "integer"]),
        ("tracking.mode=maybe", ["tracking.mode = maybe", "offline", "online", "disabled"]),
        ("seed=-1", ["seed = -1"]),
        ("+foo=1", ["foo = 1", "no such key"]),
        ("+training.foo=1", ["training.foo = 1", "no such key"]),
        ("evaluation.max_lag=128", ["evaluation.max_lag = 128", "below 128"]),
        ("dataset.eval_fraction=1", ["dataset.eval_fraction = 1"]),
        ("consistency.scale_by_window=true", ["scale_by_window"]),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_what_is_allowed(
    override: str, words: list[str]
) -> None:
    if "scale_by_window" in override:
        override = f"+{override}"
    with pytest.raises(UserError) as raised:
        config(override)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_several_mistakes_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"training.lr = -1.*seed = -2|seed = -2.*training.lr = -1"):
        config("training.lr=-1", "seed=-2")


def test_window_document_needs_a_loss_over_positions() -> None:
    with pytest.raises(UserError, match="batch_history needs a number"):
        config("consistency=batch_history", "window=document")


@pytest.mark.parametrize(
    ("layer", "index"), [("first", 0), ("quarter", 7), ("middle", 15), ("last", 29), (None, 15)]
)
def test_named_layers_are_where_they_say(layer: str | None, index: int) -> None:
    assert resolve_layer(layer, 30) == index


def test_runs_from_before_the_start_of_the_encoder_was_a_key_keep_their_names() -> None:
    tied = config("sae.encoder_scale=1.0")
    old = tied.dump()
    del old["sae"]["encoder_scale"]
    assert parse(old).sae.encoder_scale == 1 and run_id(parse(old)) == run_id(tied)
    assert run_id(config("sae.encoder_scale=0.5")) != run_id(tied)


def test_the_key_of_the_held_out_contexts_names_a_run_where_it_is_not_the_default() -> None:
    now = config("dataset.eval_key=0")
    old = now.dump()
    del old["dataset"]["eval_key"]
    assert parse(old).dataset.eval_key == 0 and run_id(parse(old)) == run_id(now)
    assert "eval_key" not in identity(now)["dataset"]
    assert run_id(config("dataset.eval_key=1")) != run_id(now)
    with pytest.raises(UserError, match="dataset.eval_key = -1"):
        config("dataset.eval_key=-1")


def test_a_separator_is_for_local_files_and_names_a_run_only_where_it_is_chosen() -> None:
    files = ("dataset=files", "dataset.path=texts")
    now = config(*files)
    assert "separator" not in identity(now)["dataset"]
    assert run_id(config(*files, "dataset.separator=null")) != run_id(now)
    with pytest.raises(UserError, match="separator is for local files"):
        config("dataset.separator='###'")


def test_what_was_run_at_other_rates_is_repeated_at_them() -> None:
    for experiment, lr in (("study", 1e-3), ("prior_art", 1e-3), ("seed_baseline", 3e-4)):
        cfg = config(f"+experiment={experiment}", "model=gemma")
        assert (cfg.training.lr, cfg.sae.encoder_scale) == (lr, 1.0), experiment


def test_identity_is_what_determines_the_result_and_nothing_else() -> None:
    base = run_id(config())
    for same in ("tracking=disabled", "store=stream", "name=mine", "rerun=true", "window=8"):
        assert run_id(config(same)) == base, same
    for other in ("seed=1", "window=9", "lambda=0.2", "layer=3", "training.tokens=7", "sae.k=31"):
        assert run_id(config(other)) != base, other


def test_a_config_survives_its_own_file() -> None:
    cfg = config("consistency=batch_history", "window=4", "training.ema_decay=0.99")
    assert parse(cfg.dump()) == cfg
    assert run_name(parse(cfg.dump())) == run_name(cfg)


def test_steps_cover_the_tokens_asked_for() -> None:
    assert config("training.tokens=4096").steps == 1
    assert config("training.tokens=4097").steps == 2


def test_installed_conf_is_the_one_in_the_repository() -> None:
    assert conf_folder() == Path(__file__).parent.parent / "conf"


def test_one_sweep_command_is_one_folder_whatever_its_order_and_launcher() -> None:
    name = _sweep_name(["--multirun", "window=4,8", "lambda=0,0.1"])
    assert name == _sweep_name(["-m", "lambda=0,0.1", "window=4,8", "hydra/launcher=slurm"])
    assert name != _sweep_name(["--multirun", "window=4,8", "lambda=0,0.2"])
    assert _sweep_name(["+experiment=lambda_ablation"]).startswith("lambda_ablation-")


def test_runs_of_the_first_study_keep_their_names() -> None:
    """A config.json without a younger key means what was done before there was one."""
    lines = (CONF.parent / "docs/results/runs.jsonl").read_text().splitlines()
    for line in lines:
        recorded = json.loads(line)
        assert run_id(parse_any(recorded["config"])) == recorded["info"]["unique_id"]
    assert len(lines) == 210


def test_what_the_first_loss_was_is_read_into_its_old_configs() -> None:
    old = config().dump()
    for key in ("variance_over", "position_weight", "features"):
        del old["consistency"][key]
    read = parse_any(old).consistency
    assert (read.variance_over, read.position_weight, read.features) == ("positions", 0, "all")
    now = config().consistency
    assert (now.variance_over, now.position_weight, now.features) == ("windows", 1, "all")


@pytest.mark.parametrize(
    "overrides",
    [
        ["consistency=none", "lambda=1"],
        ["consistency=batch_history", "consistency.scale_by_window=true"],
        ["consistency=window_variance"],
    ],
)
def test_keys_without_a_meaning_do_not_name_a_run(overrides: list[str]) -> None:
    assert set(identity(config(*overrides))["consistency"]) == {
        "form",
        "shuffle_positions",
        "scale_by_window",
    }


@pytest.mark.parametrize("key", ["position_weight=2", "variance_over=positions"])
def test_another_loss_is_another_run(key: str) -> None:
    assert run_id(config(f"consistency.{key}")) != run_id(config())


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["consistency=scale_free"], "scale_free"),
        (["consistency=slow"], "slow"),
        (["consistency=none"], "none"),
        (["consistency=first_group", "sae=matryoshka"], "scale_free (first group)"),
        (["consistency.position_weight=0"], "scale_free (position weight 0)"),
        (["consistency.variance_over=positions"], "scale_free (variance over positions)"),
        (
            ["consistency.variance_over=positions", "consistency.position_weight=0"],
            "scale_free (first version)",
        ),
        (
            ["consistency=window_variance", "consistency.position_weight=2"],
            "window_variance (position weight 2)",
        ),
    ],
)
def test_the_label_of_a_loss_says_what_is_not_as_by_default(
    overrides: list[str], label: str
) -> None:
    chosen = config(*overrides)
    assert chosen.consistency.label == label
    told = settings_of(chosen)["consistency"]
    assert told == label
    if label.startswith("scale_free"):
        control = config(*overrides, "consistency.shuffle_positions=true")
        assert settings_of(control)["consistency"] == label.replace("scale_free", "shuffled")


def test_a_baseline_has_no_settings_of_a_loss() -> None:
    by_form, by_weight = settings_of(config("consistency=none")), settings_of(config("lambda=0"))
    assert by_form == by_weight


# ---------------------------------------------------------------------- one source of defaults

PLAIN = {
    "training/default": TrainingConfig,
    "evaluation/default": EvaluationConfig,
    "store/disk": StoreConfig,
    "tracking/offline": TrackingConfig,
    "consistency/scale_free": ConsistencyConfig,
    "dataset/files": DatasetConfig,
    "model/other": ModelConfig,
    **{f"sae/{name}": config_class(name) for name in architectures()},
}
"""The option of a group that stands for the schema's defaults: conf/ shows them to a user, the
schema has them for run folders that are older than a key."""
DIFFERS_ON_PURPOSE = {
    ("sae/topk", "encoder_scale"): 1.0,  # what runs from before the key had
    ("sae/batchtopk", "encoder_scale"): 1.0,
    ("dataset/files", "path"): None,  # must be given
}


@pytest.mark.parametrize("option", sorted(PLAIN))
def test_a_default_in_conf_is_the_one_in_the_schema(option: str) -> None:
    content = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml"))
    assert isinstance(content, dict)
    shown = content.get(option.partition("/")[0], content)
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in PLAIN[option].model_fields.items()
        if not field.is_required()
    }
    different = {
        (option, key): default
        for key, default in defaults.items()
        if key in shown and shown[key] != (list(default) if isinstance(default, tuple) else default)
    }
    assert different == {k: v for k, v in DIFFERS_ON_PURPOSE.items() if k[0] == option}
