"""Every key of the configuration does something where it is taken, or is refused in one line.

A table: `CHANGES` has a row for each key, of another value, and `IDLE` the places where a key would
do nothing. A key without a row fails, and so does a row without a key.
"""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

import tcsae
from tcsae.base.errors import UserError
from tcsae.config import (
    Config,
    ConsistencyConfig,
    DatasetConfig,
    EvaluationConfig,
    ModelConfig,
    StoreConfig,
    TrackingConfig,
    TrainingConfig,
    run_id,
)
from tcsae.config.compose import compose_tree, config_of
from tcsae.config.folder import conf_folder
from tcsae.config.launcher import LocalOptions, Options, SlurmOptions, checked
from tcsae.config.sae import architectures, config_class
from tcsae.config.sweeper import AdaptiveOptions
from tcsae.config.synthetic import Children, Lifetime, PositionBound, WorldConfig
from tcsae.launch.sweeper import GridSweeper

SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "dataset": DatasetConfig,
    "consistency": ConsistencyConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "store": StoreConfig,
    "tracking": TrackingConfig,
}
WORLD_PARTS: dict[str, Any] = {
    "classes.phrase": Lifetime,
    "children": Children,
    "position": PositionBound,
}
LAUNCHERS: dict[str, Any] = {"here": Options, "local": LocalOptions, "slurm": SlurmOptions}


def all_keys() -> set[str]:
    """Every key that can be set: those of the schema, which forbids all others."""
    top = {field.alias or name for name, field in Config.model_fields.items()}
    keys = top - {"sae", *SECTIONS}
    keys |= {f"{part}.{name}" for part, kind in SECTIONS.items() for name in kind.model_fields}
    keys |= {f"model.world.{name}" for name in WorldConfig.model_fields}
    for part, kind in WORLD_PARTS.items():
        keys |= {f"model.world.{part}.{name}" for name in kind.model_fields}
    keys |= {f"sae.{name}" for a in architectures() for name in config_class(a).model_fields}
    return keys


ID = "identity"
"""The change is another run: the key is part of what a run is."""
# Another effect: the same run has the setting, and the test that is named shows what it does.
NAMED = "test_tracking.py::test_a_run_is_in_its_group_under_its_id_name_tags_and_type"
PLACE = "test_tracking.py::test_a_record_is_for_the_project_and_the_entity_of_the_config"
KEPT = "test_clean.py::test_a_finished_run_keeps_its_checkpoints_only_if_asked"
STREAM = "data/test_store.py::test_a_whole_run_works_without_activations_on_disk"

HUB = ("dataset=openwebtext",)
FILES = ("dataset=files", "dataset.path=x")
WORLD = ("model=synthetic",)
BOUND = ("model=synthetic", "world=bound")
PARENTS = (
    "model=synthetic",
    "world=absorption",
    "+model.world.classes.other={n:1,lifetime:9,density:0.1}",
)
NONE: tuple[str, ...] = ()

# key -> base, change, what comes of it.
CHANGES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "name": (NONE, "name=mine", NAMED),
    "rerun": (
        NONE,
        "rerun=true",
        "test_run.py::test_rerun_repeats_a_finished_run_with_the_same_result",
    ),
    "seed": (NONE, "seed=1", ID),
    "layer": (NONE, "layer=3", ID),
    "window": (NONE, "window=4", ID),
    "lambda": (NONE, "lambda=0.3", ID),
    "model.name": (NONE, "model.name=a/b", ID),
    "model.path": (NONE, "model.path=x", ID),
    "model.package": (NONE, "model.package=null", ID),
    "model.revision": (("model=gpt2",), "model.revision=main", ID),
    "model.n_layers": (NONE, "model.n_layers=40", ID),
    "model.default_layer": (NONE, "model.default_layer=3", ID),
    "model.hook": (NONE, "model.hook=mlp_out", ID),
    "model.dtype": (NONE, "model.dtype=float32", ID),
    "model.device": (NONE, "model.device=cuda", ID),
    "model.device_map": (NONE, "model.device_map=balanced", ID),
    "model.forward_contexts": (NONE, "model.forward_contexts=2", ID),
    "model.extra_masked_ids": (NONE, "model.extra_masked_ids=[5]", ID),
    "model.bos_id": (NONE, "model.bos_id=1", ID),
    "model.untrained": (NONE, "model.untrained=true", ID),
    "model.world": (WORLD, "world=absorption", ID),
    "model.world.name": (WORLD, "model.world.name=mine", ID),
    "model.world.seed": (WORLD, "model.world.seed=1", ID),
    "model.world.d_in": (WORLD, "model.world.d_in=64", ID),
    "model.world.document_tokens": (WORLD, "model.world.document_tokens=255", ID),
    "model.world.classes": (WORLD, "+model.world.classes.x={n:1,lifetime:1,density:0.1}", ID),
    "model.world.children": (WORLD, "model.world.children={of:phrase,per_parent:1,rate:0.1}", ID),
    "model.world.position": (WORLD, "model.world.position={n:1}", ID),
    "model.world.topics": (WORLD, "model.world.topics=2", ID),
    "model.world.correlation": (WORLD, "model.world.correlation=0.1", ID),
    "model.world.amplitude_noise": (WORLD, "model.world.amplitude_noise=0.1", ID),
    "model.world.noise": (WORLD, "model.world.noise=0.1", ID),
    "model.world.massive": (WORLD, "model.world.massive=0.1", ID),
    "model.world.massive_norm": (WORLD, "model.world.massive_norm=9", ID),
    "model.world.classes.phrase.n": (WORLD, "model.world.classes.phrase.n=9", ID),
    "model.world.classes.phrase.lifetime": (WORLD, "model.world.classes.phrase.lifetime=9", ID),
    "model.world.classes.phrase.shape": (WORLD, "+model.world.classes.phrase.shape=2", ID),
    "model.world.classes.phrase.density": (WORLD, "model.world.classes.phrase.density=0.1", ID),
    "model.world.classes.phrase.amplitude": (WORLD, "model.world.classes.phrase.amplitude=2", ID),
    "model.world.children.of": (PARENTS, "model.world.children.of=other", ID),
    "model.world.children.per_parent": (PARENTS, "model.world.children.per_parent=2", ID),
    "model.world.children.rate": (PARENTS, "model.world.children.rate=0.1", ID),
    "model.world.children.amplitude": (PARENTS, "model.world.children.amplitude=2", ID),
    "model.world.position.n": (BOUND, "model.world.position.n=2", ID),
    "model.world.position.width": (BOUND, "model.world.position.width=4", ID),
    "model.world.position.rate": (BOUND, "model.world.position.rate=0.1", ID),
    "model.world.position.amplitude": (BOUND, "model.world.position.amplitude=2", ID),
    "dataset.name": (NONE, "dataset.name=mine", ID),
    "dataset.source": (HUB, "dataset.source=files", ID),
    "dataset.path": (FILES, "dataset.path=y", ID),
    "dataset.subset": (HUB, "dataset.subset=de", ID),
    "dataset.split": (HUB, "dataset.split=test", ID),
    "dataset.revision": (HUB, "dataset.revision=main", ID),
    "dataset.text_field": (HUB, "dataset.text_field=content", ID),
    "dataset.separator": (FILES, "dataset.separator=null", ID),
    "dataset.chat": (FILES, "dataset.chat=plain", ID),
    "dataset.segments": (FILES, "dataset.segments=turn", ID),
    "dataset.n_contexts": (NONE, "dataset.n_contexts=64", ID),
    "dataset.n_eval_contexts": (NONE, "dataset.n_eval_contexts=64", ID),
    "dataset.eval_fraction": (NONE, "dataset.eval_fraction=0.2", ID),
    "dataset.context_size": (NONE, "dataset.context_size=64", ID),
    "dataset.norm_filter": (NONE, "dataset.norm_filter=10", ID),
    "dataset.seed": (NONE, "dataset.seed=1", ID),
    "dataset.eval_key": (NONE, "dataset.eval_key=1", ID),
    "consistency.form": (NONE, "consistency.form=slow", ID),
    "consistency.position_weight": (NONE, "consistency.position_weight=2", ID),
    "consistency.variance_over": (NONE, "consistency.variance_over=positions", ID),
    "consistency.features": (("sae=tsae", "consistency=scale_free"),)
    + ("consistency.features=first_group", ID),
    "consistency.shuffle_positions": (NONE, "consistency.shuffle_positions=true", ID),
    "consistency.scale_by_window": (("consistency=batch_history",),)
    + ("consistency.scale_by_window=true", ID),
    "training.tokens": (NONE, "training.tokens=1000", ID),
    "training.batch_contexts": (NONE, "training.batch_contexts=8", ID),
    "training.lr": (NONE, "training.lr=1e-4", ID),
    "training.lr_warmup": (NONE, "training.lr_warmup=0.3", ID),
    "training.lr_decay": (NONE, "training.lr_decay=0.3", ID),
    "training.sparsity_warmup": (("sae=standard",), "training.sparsity_warmup=0.3", ID),
    "training.lambda_warmup": (NONE, "training.lambda_warmup=0.3", ID),
    "training.adam_betas": (NONE, "training.adam_betas=[0.5,0.9]", ID),
    "training.grad_clip": (NONE, "training.grad_clip=null", ID),
    "training.ema_decay": (NONE, "training.ema_decay=0.9", ID),
    "training.average": (("consistency=none",), "training.average=window", ID),
    "training.target_l0": (NONE, "training.target_l0=16", ID),
    "training.precision": (NONE, "training.precision=float32", ID),
    "training.products": (
        NONE,
        "training.products=plain",
        "products/test_kernels.py::test_what_a_process_trains_by_is_what_was_asked_for",
    ),
    "training.device": (NONE, "training.device=cuda", ID),
    "training.compile": (NONE, "training.compile=true", ID),
    "training.checkpoint_every": (NONE, "training.checkpoint_every=7", ID),
    "training.keep_checkpoints": (NONE, "training.keep_checkpoints=true", KEPT),
    "training.log_every": (NONE, "training.log_every=7", ID),
    "evaluation.model_contexts": (NONE, "evaluation.model_contexts=8", ID),
    "evaluation.max_lag": (NONE, "evaluation.max_lag=8", ID),
    "evaluation.windows": (NONE, "evaluation.windows=[2]", ID),
    "evaluation.intervals": (NONE, "evaluation.intervals=false", ID),
    "evaluation.bootstrap": (NONE, "evaluation.bootstrap=200", ID),
    "evaluation.analysis": (NONE, "evaluation.analysis=false", ID),
    "evaluation.redundancy_max_lag": (NONE, "evaluation.redundancy_max_lag=2", ID),
    "evaluation.label_fields": (FILES + ("evaluation.meaning=[probes]",),)
    + ("evaluation.label_fields=[x]", ID),
    "evaluation.meaning": (NONE, "evaluation.meaning=[probes]", ID),
    "store.mode": (NONE, "store.mode=stream", STREAM),
    "store.dir": (
        NONE,
        "store.dir=x",
        "test_bad_input.py::test_a_file_where_a_folder_should_be_is_one_clear_line",
    ),
    "store.shard_contexts": (
        NONE,
        "store.shard_contexts=8",
        "data/test_store.py::test_other_activations_go_to_another_place",
    ),
    "store.also": (
        NONE,
        "store.also=[0]",
        "data/test_store.py::test_several_layers_and_hooks_are_harvested_in_one_forward_pass",
    ),
    "tracking.mode": (
        NONE,
        "tracking.mode=online",
        "test_tracking.py::test_online_a_restarted_run_has_every_step_once",
    ),
    "tracking.project": (NONE, "tracking.project=p", PLACE),
    "tracking.entity": (NONE, "tracking.entity=e", PLACE),
    "tracking.group": (NONE, "tracking.group=g", NAMED),
    "tracking.tags": (NONE, "tracking.tags=[t]", NAMED),
    "tracking.artifacts": (
        NONE,
        "tracking.artifacts=false",
        "test_tracking.py::test_without_artifacts_only_the_metrics_go_along",
    ),
    "sae.architecture": (NONE, "sae.architecture=batchtopk", ID),
    "sae.d_sae": (NONE, "sae.d_sae=512", ID),
    "sae.revival": (NONE, "sae.revival=none", ID),
    "sae.dead_after_tokens": (NONE, "sae.dead_after_tokens=7", ID),
    "sae.k_aux": (NONE, "+sae.k_aux=7", ID),
    "sae.auxk_coefficient": (NONE, "+sae.auxk_coefficient=0.5", ID),
    "sae.encoder_scale": (NONE, "sae.encoder_scale=0.5", ID),
    "sae.k": (NONE, "sae.k=4", ID),
    "sae.l1_coefficient": (("sae=standard",), "sae.l1_coefficient=0.5", ID),
    "sae.p_end": (("sae=p_anneal",), "sae.p_end=0.5", ID),
    "sae.anneal_start": (("sae=p_anneal",), "sae.anneal_start=0.5", ID),
    "sae.anneal_stages": (("sae=p_anneal",), "sae.anneal_stages=3", ID),
    "sae.threshold_rate": (("sae=batchtopk",), "sae.threshold_rate=0.5", ID),
    "sae.penalty": (("sae=jumprelu",), "sae.penalty=tanh", ID),
    "sae.l0_coefficient": (("sae=jumprelu",), "sae.l0_coefficient=0.5", ID),
    "sae.initial_threshold": (("sae=jumprelu",), "sae.initial_threshold=0.5", ID),
    "sae.bandwidth": (("sae=jumprelu",), "sae.bandwidth=0.5", ID),
    "sae.tanh_scale": (("sae=jumprelu_tanh",), "sae.tanh_scale=7", ID),
    "sae.preact_coefficient": (("sae=jumprelu_tanh",), "sae.preact_coefficient=0.5", ID),
    "sae.group_fractions": (("sae=matryoshka",), "sae.group_fractions=[0.5,0.5]", ID),
    "sae.selection": (("sae=matryoshka",), "sae.selection=token", ID),
    "sae.pair_loss": (("sae=tsae",), "sae.pair_loss=inner_product", ID),
    "sae.pairs": (("sae=tsae",), "sae.pairs=earlier", ID),
    "sae.pair_coefficient": (("sae=tsae",), "sae.pair_coefficient=0.5", ID),
    "sae.contrast_pairs": (("sae=tsae",), "sae.contrast_pairs=64", ID),
    "sae.same_document_negatives": (("sae=tsae",), "sae.same_document_negatives=true", ID),
    "sae.shuffle_positions": (("sae=tsae",), "sae.shuffle_positions=true", ID),
    "sae.initial_retention": (("sae=persistent",), "sae.initial_retention=0.5", ID),
    "sae.n_heads": (("sae=tfa",), "sae.n_heads=2", ID),
    "sae.bottleneck_factor": (("sae=tfa",), "sae.bottleneck_factor=32", ID),
    "sae.codes": (("sae=tfa",), "sae.codes=predictive", ID),
}

# Where a key would do nothing: the command, and words of the refusal.
IDLE: list[tuple[str, str]] = [
    ("dataset.split=test", "this text has no splits"),
    ("dataset.text_field=content", "this text has no fields"),
    ("dataset.chat=plain", "there are no conversations"),
    ("dataset.segments=turn", "there are no turns"),
    ("dataset.subset=de", "subset=speech"),
    ("dataset.revision=main", "leave it out"),
    ("dataset.separator=null", "leave it out"),
    ("dataset=openwebtext dataset.separator=null", "leave it out"),
    ("dataset=files dataset.path=x dataset.revision=main", "leave it out"),
    ("model.revision=main", "win over the hub"),
    ("model=gpt2 model.path=x model.revision=main", "win over the hub"),
    ("model=synthetic dataset.split=test", "this text has no splits"),
    ("model=synthetic dataset.text_field=content", "this text has no fields"),
    ("model=synthetic dataset.path=x", "has no text"),
    ("model=synthetic dataset.subset=de", "has no text"),
    ("model=synthetic dataset.separator=null", "leave it out"),
    ("model=synthetic dataset.eval_fraction=0.3", "as many documents"),
    ("model=synthetic model.hook=mlp_out", "has no language model"),
    ("model=synthetic model.dtype=bfloat16", "has no language model"),
    ("model=synthetic model.extra_masked_ids=[1]", "has no language model"),
    ("model=synthetic model.bos_id=1", "has no language model"),
    ("model=synthetic model.revision=main", "win over the hub"),
    ("model=synthetic model.device_map=auto", "is a synthetic world"),
    ("dataset=activations dataset.path=x model.device_map=auto", "activations of one's own"),
    ("model.device=cpu model.device_map=auto", "leave one out"),
    ("model.untrained=true model.device_map=auto", "untrained has none"),
    ("model=synthetic evaluation.model_contexts=8", "has no language model"),
    ("model=synthetic model.world.topics=1", "with one topic"),
    ("store=stream store.shard_contexts=8", "stores no activations"),
    ("store=stream store.also=[0]", "stores no activations"),
    ("model=synthetic store.also=[0]", "has no language model"),
    ("evaluation.intervals=false evaluation.bootstrap=200", "draws nothing"),
    ("evaluation.meaning=[probes] evaluation.label_fields=[x]", "names fields of the rows"),
    ("dataset=files dataset.path=x evaluation.label_fields=[x]", "for evaluation.meaning"),
    ("evaluation.analysis=false evaluation.redundancy_max_lag=2", "looks for no redundancy"),
    ("training.sparsity_warmup=0.3", "no sparsity coefficient"),
    ("training.target_l0=16 sae.k=8", "give one of them"),
    ("sae.revival=none +sae.k_aux=7", "for sae.revival=auxk"),
    ("sae.revival=resample +sae.auxk_coefficient=0.5", "for sae.revival=auxk"),
    ("sae=tsae sae.selection=token sae.threshold_rate=0.5", "estimates no threshold"),
    ("sae=jumprelu +sae.tanh_scale=7", "for sae.penalty=tanh"),
    ("sae=tsae sae.pair_coefficient=0 sae.pairs=earlier", "leaves the pairs out"),
    ("sae=tsae sae.pair_coefficient=0 sae.pair_loss=inner_product", "leaves the pairs out"),
    ("sae=tsae sae.pair_loss=squared_difference sae.contrast_pairs=64", "contrasts nothing"),
    ("sae=tsae sae.pair_coefficient=0 sae.same_document_negatives=true", "contrasts nothing"),
    ("sae=tsae sae.pair_coefficient=0 sae.shuffle_positions=true", "leaves the pairs out"),
    ("consistency.form=window_variance consistency.variance_over=positions", "by no variance"),
    ("consistency.form=batch_history consistency.position_weight=2", "no position term"),
    ("+consistency.scale_by_window=true", "batch_history alone"),
    ("consistency=none consistency.shuffle_positions=true", "no meaning"),
    ("consistency.features=first_group", "has no groups"),
    ("sae.l1_coefficient=0.1", "l1_coefficient"),
    ("sae=standard +sae.k=4", "no such key"),
]


@functools.cache
def composed(*overrides: str) -> Config:
    return config_of(*overrides)


def value(config: Config, key: str) -> Any:
    found: Any = config.dump()
    for part in key.split("."):
        found = found[part]
    return found


def test_every_key_has_a_row_and_every_row_a_key() -> None:
    assert all_keys() == set(CHANGES)


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_does_something_where_it_is_taken(key: str) -> None:
    base, change, effect = CHANGES[key]
    before, after = composed(*base), config_of(*base, change)
    assert value(before, key) != value(after, key)
    assert (run_id(before) != run_id(after)) == (effect == ID)
    if effect != ID:
        file, _, test = effect.partition("::")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text()


@pytest.mark.parametrize(("overrides", "words"), IDLE)
def test_a_key_that_would_do_nothing_is_refused_in_one_line(overrides: str, words: str) -> None:
    with pytest.raises((UserError, HydraException)) as refused:
        config_of(*overrides.split())
    assert words in str(refused.value)
    if isinstance(refused.value, UserError):
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("evaluation", ["quick", "default", "full"])
@pytest.mark.parametrize("rest", ["model=synthetic", "evaluation.analysis=false", "store=stream"])
def test_a_preset_is_no_choice_of_what_it_sets_in_vain(evaluation: str, rest: str) -> None:
    assert config_of(f"evaluation={evaluation}", rest).evaluation.bootstrap == 1000


def test_every_key_of_conf_is_in_the_schema() -> None:
    shown = set()
    for option in sorted((conf_folder() / "sae").glob("*.yaml")):
        tree = OmegaConf.to_container(compose_tree([f"sae={option.stem}"]))
        assert isinstance(tree, dict)
        for part, content in tree.items():
            keys = content if isinstance(content, dict) else {"": None}
            shown |= {f"{part}.{key}".rstrip(".") for key in keys}
    assert shown <= all_keys()


READ_ELSEWHERE = {
    # Where a dictionary of the config is taken whole, or only the schema itself reads the key.
    "model.default_layer": "conf/layer/default.yaml",
    "model.n_layers": "tcsae/config/run.py",
    "consistency.features": "tcsae/consistency.py",
    "sae.group_fractions": "tcsae/config/sae.py",
}


@functools.cache
def attributes() -> set[str]:
    """Every name that is read as an attribute in the package outside of its configuration."""
    root = Path(tcsae.__file__).parent
    return {
        node.attr
        for file in root.rglob("*.py")
        if "config" not in file.relative_to(root).parts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }


@pytest.mark.parametrize("key", CHANGES)
def test_every_key_is_read_by_what_it_is_for(key: str) -> None:
    name = key.rpartition(".")[2]
    if key in READ_ELSEWHERE:
        text = (Path(tcsae.__file__).parent.parent / READ_ELSEWHERE[key]).read_text()
        assert name in text
    else:
        assert {"lambda": "lambda_"}.get(name, name) in attributes()


# ----------------------------------------------------------------------------- the launchers

# Option -> another value. What each does is in tests/launch.
OPTIONS: dict[str, Any] = {
    "pack": 2,
    "device_memory_gb": 3.0,
    "dry_run": True,
    "prepare": "text",
    "compare": False,
    "tflops": 1.0,
    "bandwidth_gb_s": 2.0,
    "processes": 3,
    "gpus": [0, 1],
    "partition": "p",
    "account": "a",
    "qos": "q",
    "constraint": "c",
    "exclude": "e",
    "nodelist": "n",
    "timeout_min": 9,
    "gpus_per_node": 2,
    "cpus_per_task": 2,
    "mem_gb": 2.0,
    "array_parallelism": 2,
    "signal_delay_s": 9,
    "setup": ["module load x"],
    "additional_parameters": {"reservation": "r"},
    "wait": False,
    "closing_partition": "p",
    "max_retries": 2,
    "poll_seconds": 1.0,
}
NEEDS = {"bandwidth_gb_s": {"tflops": 1.0}}
VAIN = [
    ("here", {"bandwidth_gb_s": 2.0}, "without tflops"),
    ("local", {"bandwidth_gb_s": 2.0}, "without tflops"),
    ("here", {"pack": 2, "device_memory_gb": 3.0}, "for pack=auto"),
    ("local", {"processes": 1, "gpus": [0, 1]}, "GPUs would be idle"),
    ("slurm", {"compare": False, "closing_partition": "p"}, "nothing with compare=false"),
    ("slurm", {"wait": False, "poll_seconds": 1.0}, "nothing with wait=false"),
    ("here", {"dry_run": True, "prepare": "text"}, "take one of them"),
    ("here", {"partition": "p"}, "hydra.launcher.partition"),
]


def test_every_option_of_a_launcher_has_a_row_and_is_in_conf() -> None:
    known = {name for kind in LAUNCHERS.values() for name in kind.model_fields}
    assert known == set(OPTIONS)
    for launcher, kind in LAUNCHERS.items():
        folder = conf_folder() / "hydra" / "launcher"
        files = (OmegaConf.load(folder / f"{name}.yaml") for name in ("here", launcher))
        shown = OmegaConf.merge(*files)
        assert set(shown) - {"defaults", "_target_"} == set(kind.model_fields)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_option_of_a_launcher_is_taken_and_read(launcher: str) -> None:
    kind = LAUNCHERS[launcher]
    usual = kind()
    for name in kind.model_fields:
        chosen = checked(kind, {**NEEDS.get(name, {}), name: OPTIONS[name]})
        assert getattr(chosen, name) == OPTIONS[name] != getattr(usual, name)
        assert name in attributes()


@pytest.mark.parametrize(("launcher", "given", "words"), VAIN)
def test_an_option_of_a_launcher_that_would_do_nothing_is_refused(
    launcher: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        checked(LAUNCHERS[launcher], given)


def test_the_sweepers_keys_are_those_of_conf() -> None:
    shown = OmegaConf.load(conf_folder() / "hydra" / "sweeper" / "grid.yaml")
    taken = set(inspect.signature(GridSweeper).parameters)
    assert set(shown) - {"_target_"} == taken == {"params", "points", "max_batch_size"}
    shown = OmegaConf.load(conf_folder() / "hydra" / "sweeper" / "optuna.yaml")
    assert set(shown) - {"_target_"} == set(ADAPTIVE) == set(AdaptiveOptions.model_fields)


# Option of hydra/sweeper=optuna -> another value. What each does is in tests/launch/test_adaptive.
ADAPTIVE: dict[str, Any] = {
    "objective": "l0",
    "direction": "minimize",
    "constraints": {"l0": "<=8"},
    "baseline": "lambda=0",
    "n_trials": 3,
    "n_jobs": 2,
    "seed": 1,
    "params": {"lambda": "interval(0,1)"},
}


def test_every_option_of_the_adaptive_sweeper_is_taken_and_read() -> None:
    shown = dict(OmegaConf.load(conf_folder() / "hydra" / "sweeper" / "optuna.yaml"))
    del shown["_target_"]
    usual = checked(AdaptiveOptions, {**shown, "params": {}}, "hydra.sweeper")
    assert usual == AdaptiveOptions()
    for name, value in ADAPTIVE.items():
        chosen = checked(AdaptiveOptions, {name: value}, "hydra.sweeper")
        assert getattr(chosen, name) == value != getattr(usual, name)
        assert name in attributes()
