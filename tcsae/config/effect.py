"""Keys that would do nothing in the configuration they stand in: refused, so that nobody takes a
choice for made that was not.

Asked of what is composed from a command, not of what a run's config.json says: older runs are read
as they are. What `lambda=0` and `consistency=none` leave without effect is not refused: they are
the baselines of sweeps over those very keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tcsae.base.errors import UserError
from tcsae.config.run import Measured


class Rule(NamedTuple):
    """A key that has no effect, and so must have a value of `plain`, where `unused` is true."""

    key: str
    plain: tuple[Any, ...]
    unused: Callable[[Any], bool]
    why: str


def _has_no_choice_of_text(config: Any) -> bool:
    return config.dataset.source in ("wheel", "synthetic", "activations")


def _is_not_on_the_hub(config: Any) -> bool:
    model = config.model
    return _has_no_model(config) or model.path is not None or model.package is not None


def _has_no_model(config: Any) -> bool:
    return config.model.why_no_text is not None


def _is_a_world(config: Any) -> bool:
    return config.model.world is not None


def _has_no_coefficient(config: Any) -> bool:
    return hasattr(config.sae, "k")


def _has_no_auxk(config: Any) -> bool:
    return getattr(config.sae, "revival", "auxk") != "auxk"


def _has_no_pairs(config: Any) -> bool:
    return getattr(config.sae, "pair_coefficient", 1) == 0


def _has_no_contrast(config: Any) -> bool:
    return _has_no_pairs(config) or config.sae.pair_loss == "squared_difference"


_NO_TEXT = "what is in a model's place has no text"
_NO_MODEL = "what is in a model's place has no language model"
_NO_PAIRS = "sae.pair_coefficient=0 leaves the pairs out"
_NO_CONTRAST = "sae.pair_loss=squared_difference contrasts nothing, and sae.pair_coefficient=0 too"
MEASURED = (
    Rule("dataset.split", ("train",), _has_no_choice_of_text, "this text has no splits"),
    Rule("dataset.text_field", ("text",), _has_no_choice_of_text, "this text has no fields"),
    Rule("dataset.chat", ("template",), _has_no_choice_of_text, "there are no conversations"),
    Rule("dataset.segments", ("document",), _has_no_choice_of_text, "there are no turns"),
    Rule("dataset.path", (None,), _is_a_world, _NO_TEXT),
    Rule("dataset.subset", (None,), _has_no_model, _NO_TEXT),
    Rule(
        "dataset.eval_fraction",
        (0.15,),
        _is_a_world,
        "a world has as many documents for both sides as they need",
    ),
    Rule("model.hook", ("resid_post",), _is_a_world, _NO_MODEL),
    Rule("model.dtype", ("auto", "float32"), _has_no_model, _NO_MODEL),
    Rule("model.extra_masked_ids", ([],), _has_no_model, _NO_MODEL),
    Rule("model.bos_id", (None,), _has_no_model, _NO_MODEL),
    Rule("evaluation.model_contexts", (64, 16, 256), _has_no_model, _NO_MODEL),
    Rule(
        "model.world.correlation",
        (0.0,),
        lambda config: _is_a_world(config) and config.model.world.topics == 1,
        "with one topic every document is of it",
    ),
    Rule(
        "model.revision",
        (None,),
        _is_not_on_the_hub,
        "it is for models of the hub, and model.path, package and world win over the hub",
    ),
    Rule(
        "store.shard_contexts",
        (128,),
        lambda config: config.store.mode == "stream",
        "store=stream stores no activations",
    ),
    Rule(
        "store.also",
        ([],),
        lambda config: config.store.mode == "stream",
        "store=stream stores no activations",
    ),
    Rule("store.also", ([],), _has_no_model, _NO_MODEL),
    Rule(
        "evaluation.bootstrap",
        (1000,),
        lambda config: not config.evaluation.intervals,
        "evaluation.intervals=false draws nothing",
    ),
    Rule(
        "evaluation.label_fields",
        ([],),
        lambda config: (
            config.dataset.source != "files" or "probes" not in config.evaluation.meaning
        ),
        "it names fields of the rows of dataset=files, for evaluation.meaning=[probes]",
    ),
    Rule(
        "evaluation.redundancy_max_lag",
        (8, 32),
        lambda config: not config.evaluation.analysis,
        "evaluation.analysis=false looks for no redundancy",
    ),
)
"""Of whatever is measured."""
TRAINED = (
    Rule(
        "training.sparsity_warmup",
        (0.1,),
        _has_no_coefficient,
        "the architecture has k features a token, and no sparsity coefficient that could rise",
    ),
    Rule(
        "sae.threshold_rate",
        (0.1,),
        lambda config: getattr(config.sae, "selection", "batch") == "token",
        "sae.selection=token estimates no threshold",
    ),
    Rule("sae.k_aux", (None,), _has_no_auxk, "it is for sae.revival=auxk"),
    Rule("sae.auxk_coefficient", (1 / 32,), _has_no_auxk, "it is for sae.revival=auxk"),
    Rule(
        "sae.tanh_scale",
        (96.0,),
        lambda config: config.sae.penalty == "step",
        "it is for sae.penalty=tanh",
    ),
    Rule("sae.pair_loss", ("cosine",), _has_no_pairs, _NO_PAIRS),
    Rule("sae.pairs", ("adjacent",), _has_no_pairs, _NO_PAIRS),
    Rule("sae.shuffle_positions", (False,), _has_no_pairs, _NO_PAIRS),
    Rule("sae.contrast_pairs", (1024,), _has_no_contrast, _NO_CONTRAST),
    Rule("sae.same_document_negatives", (False,), _has_no_contrast, _NO_CONTRAST),
    Rule(
        "consistency.variance_over",
        ("windows",),
        lambda config: config.consistency.form in ("window_variance", "batch_history"),
        "the form divides by no variance",
    ),
    Rule(
        "consistency.position_weight",
        (0.0, 1.0),  # of conf/'s options, over which a form may be set
        lambda config: config.consistency.form == "batch_history",
        "the form has no position term",
    ),
)
"""Of what is trained too."""


def _value(config: Any, key: str) -> Any:
    found = config
    for name in key.split("."):
        found = getattr(found, name, ...)
    return found


def refuse_without_effect(config: Measured) -> None:
    """Raises UserError, in one line, naming every key whose value would change nothing."""
    rules = MEASURED + (TRAINED if hasattr(config, "training") else ())
    idle = [
        f"{rule.key} = {value}: it would do nothing, {rule.why}: leave it out"
        for rule in rules
        if (value := _value(config, rule.key)) not in (..., *rule.plain) and rule.unused(config)
    ]
    if idle:
        raise UserError("; ".join(idle))
