"""The typed schema of conf/: every key, its bounds, and the one-line message when they are broken.

`parse` turns what Hydra composed into a frozen `Config`; nothing is loaded before it has passed.
`run_id` is the hash of what determines a run's result: two runs with the same id are the same run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from tcsae.base.errors import UserError
from tcsae.config.sae import SAEConfig, architectures, config_class
from tcsae.config.strict import StrictModel
from tcsae.config.synthetic import WorldConfig

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Hook = Literal["resid_pre", "resid_post", "mlp_out", "attn_out"]
_DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?")


def _check_device(value: str) -> str:
    # torch knows more: on "meta" everything runs, and nothing has a value.
    if _DEVICE.fullmatch(value) is None:
        raise ValueError("must be cpu, cuda, cuda:N or mps")
    return value


def _check_auto_device(value: str) -> str:
    if value != "auto" and _DEVICE.fullmatch(value) is None:
        raise ValueError("must be auto, cpu, cuda, cuda:N or mps")
    return value


# Whether there is such a device is asked where it is used.
Device = Annotated[str, AfterValidator(_check_device)]
AutoDevice = Annotated[str, AfterValidator(_check_auto_device)]


def _device_map(value: Any) -> Any:
    """auto, balanced, or {module: device}; as JSON too, for names that Hydra's grammar refuses."""
    if value is None or value in ("auto", "balanced"):
        return value
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(value, dict) or not value:
        raise ValueError("must be auto, balanced, {module: device} or null")
    places = {
        str(module): f"cuda:{place}" if isinstance(place, int) else str(place)
        for module, place in value.items()
    }
    for module, place in places.items():
        if _DEVICE.fullmatch(place) is None:
            raise ValueError(f"{module or 'all'} on {place}: must be cpu, cuda:N (or N) or mps")
    if len({place.partition(":")[0] for place in places.values()}) > 1:
        raise ValueError("all on GPUs, or all on the CPU: TransformerLens reads no mixture")
    return places


DeviceMap = Annotated[str | dict[str, str] | None, BeforeValidator(_device_map)]


class ModelConfig(StrictModel):
    """The language model and where in it activations are read."""

    name: str
    """TransformerLens / Hugging Face name; also names the run."""
    path: str | None = None
    """Local folder of weights and tokenizer; wins over package and hub."""
    package: str | None = None
    """Installed Python package that carries the weights as a GGUF file; wins over the hub."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    n_layers: Count | None = None
    """Number of blocks, if known before loading; ignored with `path`."""
    default_layer: Annotated[int, Field(ge=0)] | None = None
    hook: Hook | Literal["given"] = "resid_post"
    """given: vectors from files, of no model that is here (dataset=activations)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: AutoDevice = "auto"
    device_map: DeviceMap = None
    """Of a model that fills more than one GPU, as transformers' from_pretrained takes it."""
    forward_contexts: Count = 16
    """Contexts in one forward pass."""
    extra_masked_ids: list[int] = []
    """Token ids left out like special tokens, beyond the tokenizer's own pad, bos and eos."""
    bos_id: int | None = None
    """The token that starts every context; null: the tokenizer's bos (or eos if it has none)."""
    untrained: bool = False
    """The control: the same model with its random initial weights in place of the trained ones."""
    world: WorldConfig | None = None
    """In place of a language model, a world of features that are known (model=synthetic)."""

    @model_validator(mode="after")
    def _world_is_all(self) -> Self:
        if self.world is not None and (self.path or self.package or self.untrained):
            raise ValueError("world=... is for model=synthetic: a language model has none")
        if self.is_given and (self.world or self.path or self.package or self.untrained):
            raise ValueError("hook=given is for dataset=activations, which reads no model")
        return self

    @model_validator(mode="after")
    def _is_placed_once(self) -> Self:
        if self.device_map is None:
            return self
        if self.device != "auto":
            raise ValueError("device and device_map both say where the model is: leave one out")
        if self.untrained:
            raise ValueError("device_map is for weights that are read: untrained has none")
        if why := self.why_no_text:
            raise ValueError(f"device_map is for a language model, and {why}")
        return self

    @property
    def is_given(self) -> bool:
        """Whether activations come from files of one's own."""
        return self.hook == "given"

    @property
    def why_no_text(self) -> str | None:
        """What it is in place of a language model; None: it is one."""
        if self.world is not None:
            return f"{self.name} is a synthetic world"
        return "these are activations of one's own" if self.is_given else None


class DatasetConfig(StrictModel):
    """The text, and how it becomes contexts."""

    name: str
    source: Literal["wheel", "files", "hub", "synthetic", "activations"]
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    separator: Annotated[str, Field(min_length=1)] | None = "auto"
    """What stands between the documents of a local file; auto: <|endoftext|> and its like."""
    chat: Literal["template", "plain"] = "template"
    """How conversations become text: by the tokenizer's chat template if there is one, or plain."""
    segments: Literal["document", "turn"] = "document"
    """What no window of the loss crosses; turn is for conversations."""
    n_contexts: Count | None = None
    """Training contexts; null: all that a finite text gives."""
    n_eval_contexts: Count = 256
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the documents' groups held out."""
    context_size: Annotated[int, Field(ge=4, le=32768)] = 128
    norm_filter: Annotated[float, Field(ge=0)] = 3
    """Tokens with a norm above this multiple of the median are invalid; 0: no filter."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Which training contexts, and their order."""
    eval_key: Annotated[int, Field(ge=0)] = 0
    """Which held-out contexts; no seed changes them."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        if self.source == "wheel" and self.subset not in (None, "speech"):
            raise ValueError(
                f"subset={self.subset}: of the plays there is subset=speech (no names, headings, "
                "directions and line ends), or leave it out"
            )
        if self.source != "hub" and self.revision is not None:
            raise ValueError("revision is for datasets of the hub; leave it out here")
        if self.source != "files" and self.separator != "auto":
            raise ValueError("separator is for local files; leave it out here")
        return self


AVERAGED = "averaged"
"""In the place of a temporal loss, that means of windows or documents were trained on."""
TEMPORAL_FORMS = ("scale_free", "window_variance", "slow")
"""The forms of the loss that see positions."""


class ConsistencyConfig(StrictModel):
    """Which form of the temporal loss (docs/method.md)."""

    form: Literal["scale_free", "window_variance", "slow", "batch_history", "none"]
    position_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """beta: weight of the position term beside the window variance, within lambda."""
    variance_over: Literal["windows", "positions"] = "windows"
    """What scale_free and slow divide by: the variance as the windows see it, or over all positions
    alike, which can be lowered by moving energy to the edges of contexts (the first study's)."""
    features: Literal["all", "first_group"] = "all"
    """What the loss is on; first_group is for dictionaries that have groups."""
    shuffle_positions: bool = False
    scale_by_window: bool = False
    """batch_history only: its second version, lambda / window."""

    @model_validator(mode="after")
    def _forms_fit(self) -> ConsistencyConfig:
        if self.form in ("batch_history", "none") and self.shuffle_positions:
            raise ValueError(f"shuffle_positions has no meaning with form={self.form}")
        if self.scale_by_window and self.form != "batch_history":
            raise ValueError("scale_by_window belongs to form=batch_history alone")
        return self

    @property
    def label(self) -> str:
        """The form and what is not as by default, in words."""
        said = []
        if self.form in ("scale_free", "slow") and self.variance_over == "positions":
            said.append("first version" if not self.position_weight else "variance over positions")
        usual = 1.0 if self.form == "scale_free" and "first version" not in said else 0.0
        if self.form in TEMPORAL_FORMS and self.position_weight != usual:
            said.append(f"position weight {self.position_weight:g}")
        if self.features == "first_group" and self.form != "none":
            said.append("first group")
        return self.form + (f" ({', '.join(said)})" if said else "")


class TrainingConfig(StrictModel):
    """The optimizer's run. Shares are of the number of steps."""

    tokens: Count
    """Tokens the SAE sees, masked ones included; steps = ceil(tokens / tokens in a batch)."""
    batch_contexts: Count = 32
    lr: Annotated[float, Field(gt=0, le=1)]
    lr_warmup: Share = 0.05
    lr_decay: Share = 0.2
    sparsity_warmup: Share = 0.1
    lambda_warmup: Share = 0.1
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    target_l0: Annotated[float, Field(gt=0)] | None = None
    """Features active on a token, on average: the sparsity coefficient is steered until it is so
    (tcsae/training/sparsity.py), or k set to it."""
    average: Literal["none", "window", "document"] = "none"
    """What is trained on in place of single tokens: the mean activation of every `window` of
    positions or of every document of a context (the baseline of turn-averaged SAEs)."""
    precision: Literal["auto", "float32", "bfloat16", "tf32"] = "auto"
    """Of a step's products; tf32 is float32 with short mantissas, on GPUs alone."""
    products: Literal["auto", "plain", "triton"] = "auto"
    """What a step's operations are made by (tcsae/products); auto: what is fastest there."""
    device: Device | None = None
    """Where the SAE is, in training and when it is measured; null: where the model is."""
    compile: bool = False
    """Through torch.compile, for GPUs (tcsae/training/compiled.py)."""
    checkpoint_every: Count = 100
    keep_checkpoints: bool = False
    """Whether they stay when the run has finished."""
    log_every: Count = 10

    @field_validator("adam_betas", mode="before")
    @classmethod
    def _list_is_a_pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class EvaluationConfig(StrictModel):
    """What is measured on the held-out contexts."""

    model_contexts: Count = 64
    max_lag: Count = 32
    windows: list[Annotated[int, Field(ge=2)]] = [2, 4, 8, 16, 32]
    intervals: bool = True
    """Of the metrics by feature: all of them again without each document, the longest part."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    analysis: bool = True
    """Redundancy, clusters and top contexts, and their part of the report."""
    redundancy_max_lag: Annotated[int, Field(ge=0)] = 8
    meaning: list[Literal["probes", "shift", "lengths"]] = []
    """Instruments of tcsae/meaning, by name."""
    label_fields: list[Annotated[str, Field(min_length=1)]] = []
    """Of the rows of dataset=files: fields of labels that probes learn, or of [start, end, tag]."""


class StoreConfig(StrictModel):
    """Where activations live."""

    mode: Literal["disk", "stream"] = "disk"
    dir: str
    shard_contexts: Count = 128
    also: list[int | str] = []
    """Further places of the same model, "LAYER" or "LAYER.HOOK", harvested in the same forward
    pass, for the runs that read them. A sweep over layers sets it by itself."""

    @field_validator("also")
    @classmethod
    def _are_places(cls, value: list[int | str]) -> list[int | str]:
        for place in value:
            layer, hook = place_of(place)
            resolve_layer(layer, 10_000)
            if hook is not None and hook not in get_args(Hook):
                raise ValueError(
                    f"{place}: a place is LAYER or LAYER.HOOK, the hook one of "
                    f"{', '.join(get_args(Hook))}"
                )
        return value


WANDB_REFUSES = frozenset("/\\#?%:")
"""What W&B takes in no name of a project or an entity."""


class TrackingConfig(StrictModel):
    """What W&B gets, beside metrics.jsonl. Lengths are W&B's own limits."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: Annotated[str, Field(min_length=1, max_length=128)] = "tcsae"
    entity: Annotated[str, Field(min_length=1)] | None = None
    group: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Runs of one group are shown together: the sweep."""
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []
    """Beside those that every run has (tcsae/jobs/tracking.py)."""
    artifacts: bool = True
    """Whether the SAE and the report go along."""

    @field_validator("project", "entity")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        # W&B's own rule for projects; what it refuses would be refused after the training.
        if bad := sorted(set(value or "") & WANDB_REFUSES):
            raise ValueError(
                f"W&B takes no {' '.join(bad)} in a name; what stands before a / of a project is "
                "tracking.entity"
            )
        return value


NEED_A_LANGUAGE_MODEL = ("shift", "lengths")
"""Instruments of tcsae/meaning that run text through the model again."""


class Measured(StrictModel):
    """What an SAE is measured on: in the config of every run."""

    name: str | None = None
    rerun: bool = False
    layer: int | str | None = None
    """Block number, first, quarter, middle or last; null: the middle."""
    window: int | str = 8
    """Positions in a window, or document."""
    model: ModelConfig
    dataset: DatasetConfig
    evaluation: EvaluationConfig
    store: StoreConfig

    @field_validator("layer", "window", mode="before")
    @classmethod
    def _whole_number_or_name(cls, value: Any) -> Any:
        if isinstance(value, float):
            raise ValueError("must be a whole number or one of the named options")
        return value

    @model_validator(mode="after")
    def _contexts_fit(self) -> Self:
        size = self.dataset.context_size
        if self.window != "document" and not (
            isinstance(self.window, int) and 2 <= self.window <= size
        ):
            raise ValueError(
                f"window = {self.window}: must be 2 to {size} (dataset.context_size), or document"
            )
        if self.evaluation.max_lag >= size:
            raise ValueError(
                f"evaluation.max_lag = {self.evaluation.max_lag}: must be below {size} "
                "(dataset.context_size)"
            )
        if (self.model.world is None) != (self.dataset.source != "synthetic"):
            raise ValueError(
                "model=synthetic and dataset=synthetic go together: the documents of a synthetic "
                "world are its own, and a language model reads text (world=... is for "
                "model=synthetic alone)"
            )
        if self.model.is_given != (self.dataset.source == "activations"):
            raise ValueError(
                "dataset=activations and model=activations go together, and each chooses the "
                "other: leave out any other choice of model or dataset"
            )
        if self.model.world is not None:
            self.model.world.check_contexts(size)
        if unfit := self.unfit_instruments(self.evaluation.meaning):
            raise ValueError(unfit)
        # The highest number that could be right, where the model's own is not known yet.
        known = self.model.path is None and self.model.n_layers
        resolve_layer(self.layer, known or 10_000)
        return self

    @property
    def sae_device(self) -> str | None:
        """Where the SAE is, by a key of its own; None: where the model is."""
        return None

    @property
    def uses_gpu(self) -> bool:
        """Whether it may compute elsewhere than on the CPU."""
        return {self.model.device, self.sae_device or self.model.device} != {"cpu"}

    def unfit_instruments(self, names: Sequence[str]) -> str | None:
        """Why the model of this run allows some instruments of `evaluation.meaning` no answer."""
        again = [name for name in names if name in NEED_A_LANGUAGE_MODEL]
        if not again or self.model.why_no_text is None:
            return None
        return (
            f"evaluation.meaning = [{','.join(again)}]: text goes through a language model again "
            f"there, and {self.model.why_no_text}: leave it out, or choose a language model"
        )

    def dump(self) -> dict[str, Any]:
        """Plain JSON-ready dict with the keys of conf/."""
        return self.model_dump(mode="json", by_alias=True)


class Source(StrictModel):
    """Where an SAE that was not trained here comes from."""

    folder: str
    """As it was given; of SAELens' pretrained ones "RELEASE SAE_ID"."""
    pretrained: bool = False
    """Whether `folder` is a release and an id."""
    sha256: str
    """Of the file of weights; of a pretrained SAE, of the one that sae-lens saves."""
    architecture: str
    """By the source's own word."""
    library: Literal["SAELens", "dictionary_learning", "sparsify", "Gemma Scope", "OpenAI", "tcsae"]
    """Who wrote it."""
    made_for: str | None = None
    """Model and hook, by the source's own word."""
    cautions: list[str] = []
    """What makes the results less than they could be."""

    @property
    def title(self) -> str:
        """Short, for tables."""
        return self.folder if self.pretrained else "/".join(Path(self.folder).parts[-2:])


class LoadedSAE(StrictModel):
    """The part of a loaded SAE's config that its file shows."""

    architecture: str
    """Name in tcsae.sae.registry of the class that computes it."""
    d_sae: Count
    k: Count | None = None


class LoadedConfig(Measured):
    """The config of an SAE that was loaded, not trained here. It has no training keys."""

    sae: LoadedSAE
    source: Source


class Config(Measured):
    """One job. `cfg.lambda_` is the key `lambda`, a reserved word in Python."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    lambda_: Annotated[float, Field(ge=0, alias="lambda")] = 1.0
    sae: SerializeAsAny[SAEConfig]
    consistency: ConsistencyConfig
    training: TrainingConfig
    tracking: TrackingConfig

    @model_validator(mode="before")
    @classmethod
    def _target_is_k(cls, raw: Any) -> Any:
        """Architectures with a k have that L0 by construction."""
        if not isinstance(raw, dict):
            return raw
        sae, training = raw.get("sae"), raw.get("training")
        if not isinstance(sae, dict) or not isinstance(training, dict) or "k" not in sae:
            return raw
        target = training.get("target_l0")
        if not isinstance(target, int | float) or sae.get("architecture") not in architectures():
            return raw
        if target != round(target):
            raise ValueError(
                f"training.target_l0 = {target}: sae={sae.get('architecture')} has a whole number "
                "of features a token"
            )
        usual = config_class(sae["architecture"]).model_fields["k"].default
        if sae["k"] not in (usual, target):
            raise ValueError(
                f"sae.k = {sae['k']} and training.target_l0 = {target}: of this architecture both "
                "say k; give one of them"
            )
        return {**raw, "sae": {**sae, "k": round(target)}}

    @field_validator("sae", mode="before")
    @classmethod
    def _architecture_decides(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("architecture")
        if name not in architectures():
            raise ValueError(f"architecture must be one of {', '.join(architectures())}")
        return config_class(name).model_validate(value)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.window == "document" and self.consistency.form == "batch_history":
            raise ValueError("window = document: batch_history needs a number of batches")
        if self.consistency.features == "first_group" and len(self.sae.group_sizes) < 2:
            raise ValueError(
                f"consistency.features = first_group: sae={self.sae.architecture} has no groups "
                "(matryoshka and tsae have)"
            )
        if self.training.average != "none" and (of_order := self._what_sees_order()):
            raise ValueError(
                f"training.average = {self.training.average}: the codes of a mean are the same for "
                f"all its tokens, and {of_order}"
            )
        if (
            self.has_temporal_loss
            and self.consistency.position_weight > 0
            and self.training.batch_contexts < 2
        ):
            raise ValueError(
                "training.batch_contexts = 1: the position term compares contexts, take 2 or more "
                "(or consistency.position_weight=0)"
            )
        return self

    def _what_sees_order(self) -> str:
        """What of the job looks at the order of tokens, and the way out; empty: nothing."""
        if self.lambda_ > 0 and self.consistency.form != "none":
            return f"consistency={self.consistency.form} is about their order: consistency=none"
        # The control of an architecture shuffles what it sees of the order.
        if hasattr(self.sae, "shuffle_positions"):
            return f"sae={self.sae.architecture} is about their order: take another (topk)"
        return ""

    @property
    def sae_device(self) -> str | None:
        return self.training.device

    @property
    def averaged(self) -> str:
        """What was trained on in place of single tokens, in words; empty: single tokens."""
        if self.training.average == "none":
            return ""
        if self.training.average == "document" or self.window == "document":
            return "the mean of every document of a context"
        return f"the mean of every {self.window} positions"

    @property
    def loss_words(self) -> str:
        """The temporal loss; `AVERAGED` where means were trained on in place of one."""
        return AVERAGED if self.averaged else self.consistency.label

    @property
    def has_temporal_loss(self) -> bool:
        """Whether a loss on positions takes part in training."""
        return self.lambda_ > 0 and self.consistency.form in TEMPORAL_FORMS

    @property
    def loss_window(self) -> int | str:
        """Valid tokens in a row, or all of a document, that one term of the temporal loss needs."""
        return 2 if self.consistency.form == "slow" else self.window

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return -(
            -self.training.tokens // (self.training.batch_contexts * self.dataset.context_size)
        )


def shared_by_a_bank(config: Config) -> dict[str, Any]:
    """What decides which activations a job sees, in which order, and what it is trained by: equal
    for the jobs of a bank."""
    parts = config.dump()
    shared = {key: parts[key] for key in ("model", "layer", "dataset")}
    training = {key: parts["training"][key] for key in ("batch_contexts", "products", "device")}
    return shared | {f"training.{key}": value for key, value in training.items()}


def place_of(place: int | str) -> tuple[int | str, str | None]:
    """The layer and the hook (None: the run's own) of an entry of `store.also`."""
    layer, _, hook = str(place).partition(".")
    return int(layer) if layer.isdigit() else layer, hook or None


def resolve_layer(layer: int | str | None, n_layers: int) -> int:
    """The block number that `layer` names in a model of `n_layers` blocks.

    Raises ValueError, naming the valid range, for a number that the model does not have.
    """
    named = {"first": 0, "quarter": n_layers // 4, "middle": n_layers // 2, "last": n_layers - 1}
    index = named["middle"] if layer is None else named.get(layer, layer)  # type: ignore[arg-type]
    if not 0 <= index < n_layers:
        raise ValueError(f"layer = {layer}: must be 0 to {n_layers - 1}, or {', '.join(named)}")
    return index


def _one_line(error: ValidationError) -> str:
    parts = []
    for detail in error.errors():
        keys = [
            str(k) for k in detail["loc"] if not str(k).startswith(("literal[", "constrained-"))
        ]
        keys = [k for k in keys if k not in ("int", "float", "str", "function-after")]
        key, message = ".".join(keys), detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = "no such key (see --cfg job for the keys there are)"
        shown = "" if not key or isinstance(detail["input"], dict) else f" = {detail['input']}"
        parts.append(f"{key}{shown}: {message}" if key else message)
    return "; ".join(dict.fromkeys(parts))


_M = TypeVar("_M", bound=Measured)


def _parsed(kind: type[_M], raw: dict[str, Any]) -> _M:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None


def parse(raw: dict[str, Any]) -> Config:
    """A checked `Config` from a plain dict. Raises UserError, in one line, with every mistake."""
    return _parsed(Config, raw)


def parse_loaded(raw: dict[str, Any]) -> LoadedConfig:
    """Like `parse`, for an SAE that was not trained here."""
    return _parsed(LoadedConfig, raw)


_FIRST_LOSS = {"variance_over": "positions", "position_weight": 0.0, "features": "all"}
"""What the temporal loss was before these keys: a config.json without them means this."""


def parse_any(raw: dict[str, Any]) -> Config | LoadedConfig:
    """Like `parse`, for any run's config.json, of either kind."""
    if "source" in raw:
        return parse_loaded(raw)
    if isinstance(part := raw.get("consistency"), dict):
        raw = {**raw, "consistency": {**_FIRST_LOSS, **part}}
    return parse(raw)


# What does not change the result of a run: where things are written, and what it is called.
_NOT_IDENTITY = ("name", "rerun", "tracking", "store")


def _used_keys(consistency: dict[str, Any]) -> dict[str, Any]:
    """Without the keys of `_FIRST_LOSS` that have its value, or no meaning for the form."""
    meaningless = {
        "variance_over": consistency["form"] not in ("scale_free", "slow"),
        "position_weight": consistency["form"] in ("none", "batch_history"),
        "features": consistency["form"] == "none",
    }
    return {
        key: value
        for key, value in consistency.items()
        if not meaningless.get(key, False) and _FIRST_LOSS.get(key, object()) != value
    }


def identity(config: Measured) -> dict[str, Any]:
    """The part of the config that determines the result of the run."""
    content = {k: v for k, v in config.dump().items() if k not in _NOT_IDENTITY}
    if isinstance(config, LoadedConfig):
        # The weights are the same wherever they lie.
        content["source"] = {"sha256": config.source.sha256}
    if "training" in content:
        del content["training"]["products"]  # the same sums in another order
        del content["training"]["keep_checkpoints"]
    # Younger than the first runs: where they are not used, those keep their names.
    if "consistency" in content:
        content["consistency"] = _used_keys(content["consistency"])
    for part, key, unused in (
        ("training", "target_l0", None),
        ("training", "compile", False),
        ("training", "device", None),
        ("training", "average", "none"),
        ("evaluation", "intervals", True),
        ("evaluation", "meaning", []),
        ("evaluation", "label_fields", []),
        ("model", "device_map", None),
        ("model", "untrained", False),
        ("model", "world", None),
        ("dataset", "eval_key", 0),
        ("dataset", "separator", "auto"),
        ("dataset", "chat", "template"),
        ("dataset", "segments", "document"),
        ("sae", "same_document_negatives", False),
        ("sae", "encoder_scale", 1.0),
        ("sae", "selection", "batch"),
    ):
        if part in content and content[part].get(key, ...) == unused:
            del content[part][key]
    return content


def run_id(config: Measured) -> str:
    """Ten hex digits of the SHA-256 of `identity(config)`."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def run_name(config: Config | LoadedConfig) -> str:
    """A folder name that people can read and that is unique for the run."""
    model = Path(config.model.path or config.model.name).name.lower()
    model += "-untrained" if config.model.untrained else ""
    layer = "mid" if config.layer is None else config.layer
    start = f"{model}-l{layer}-{config.sae.architecture}"
    if isinstance(config, LoadedConfig):
        return f"{start}-loaded-{run_id(config)}"
    form = config.consistency.form + ("-shuffled" if config.consistency.shuffle_positions else "")
    form = AVERAGED if config.averaged else form
    return (
        f"{start}-{form}-w{config.window}-lambda{config.lambda_:g}-s{config.seed}-{run_id(config)}"
    )
