"""Where what an SAE was made for is not what it is measured on, in words.

One row of `ROWS` for each fact that a folder may tell. A row is asked only if the folder tells it;
what it answers is one sentence for log, notes and page, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tcsae.config import LoadedConfig
from tcsae.data.activation_model import ActivationModel
from tcsae.jobs.facts import ONE_THRESHOLD, TRAINED_ON, UNKNOWN, WITHOUT_METADATA, Facts

LONGEST = 120
"""Characters of a foreign file's word that are repeated."""

# What TransformerLens can do to weights. Of these, only centring moves the activations that are
# read here: the others leave the residual stream and what blocks write to it as they are.
_PROCESSING = (
    *("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"),
    "refactor_factored_attn_matrices",
)
_MOVES = "center_writing_weights"
# How the model was fetched and where it ran.
_LOADING = (
    *("attn_implementation", "cache_dir", "default_padding_side", "device", "device_map"),
    *("dtype", "force_download", "local_files_only", "low_cpu_mem_usage", "n_devices"),
    *("revision", "token", "torch_dtype", "trust_remote_code", "use_auth_token", "use_cache"),
)
_HALF = ("bfloat16", "float16")
_BATCHTOPK = ("batchtopk", "matryoshka", "matryoshka_batchtopk")
_THRESHOLD_FOLDED_SINCE = (6, 54, 9)
_UNPROCESSED_SINCE = (3, 19, 2)


class Here(NamedTuple):
    """What the SAE is measured on."""

    model: str
    hook_name: str
    context_size: int
    dataset: tuple[str, ...]
    """Its names."""
    dtype: str
    """Of the language model."""
    masked: frozenset[int]
    """Tokens that are not measured."""
    eos_is_bos: bool = False
    """Whether one token is both, as GPT-2's."""


Said = Mapping[str, Any]


class _Row(NamedTuple):
    key: str
    """SAELens' name of the fact."""
    says: Callable[[Any, Here, Said], str | None]
    """(value, where it is measured, all that is said) -> the caution, if there is a difference."""


def cautions(facts: Facts, config: LoadedConfig, model: ActivationModel) -> list[str]:
    """One sentence for every difference that the SAE's own files let one see."""
    names = (config.dataset.path, config.dataset.name)
    here = Here(
        model=config.model.name,
        hook_name=model.hook_name,
        context_size=config.dataset.context_size,
        dataset=tuple(name for name in names if name),
        dtype=_plain(model.dtype),
        masked=model.special_ids.masked,
        # Contexts start with one id, and it alone ends a document.
        eos_is_bos=len(model.special_ids.boundaries) == 1,
    )
    told = {"model_name": facts.model, "hook_name": facts.hook_name}
    return differences({**told, "context_size": facts.context_size, **facts.said}, here)


def differences(said: Said, here: Here) -> list[str]:
    """Of what is `said`, by SAELens' names, what is not so `here`; in the order of `ROWS`."""
    found = (row.says(said[row.key], here, said) for row in ROWS if said.get(row.key) is not None)
    return [text for text in found if text]


# ------------------------------------------------------------------------------ the facts


def _hook(value: Any, here: Here, said: Said) -> str | None:
    if value == here.hook_name:
        return None
    return f"The SAE was made for {_word(value)} and is measured at {here.hook_name}."


def _model(value: Any, here: Here, said: Said) -> str | None:
    if _same_name(value, here.model) or _same_name(hub_name(str(value)), hub_name(here.model)):
        return None
    return f"The SAE was made for the model {_word(value)} and is measured on {here.model}."


def _model_class(value: Any, here: Here, said: Said) -> str | None:
    if value in ("HookedTransformer", "AutoModelForCausalLM"):
        return None
    return (
        f"The SAE was made on activations taken by {_word(value)} (model_class_name); here they "
        "come from transformers' own model."
    )


def _weights(value: Any, here: Here, said: Said) -> str | None:
    given = value if isinstance(value, dict) else {}
    changes = {k: v for k, v in given.items() if k not in _LOADING and v not in (None, False)}
    if not changes:
        return None
    listed = ", ".join(f"{_word(key)}={_word(value)}" for key, value in changes.items())
    harmless = changes.keys() <= {*_PROCESSING} - {_MOVES}
    effect = (
        "that leaves the activations at this hook as they are, up to rounding"
        if harmless
        else "the results may be below what it can do"
    )
    return (
        f"The SAE was made for activations of a model whose weights were processed ({listed}); "
        f"here the model is as it was published: {effect}."
    )


def _weights_unsaid(value: Any, here: Here, said: Said) -> str | None:
    if value is not True or "model_from_pretrained_kwargs" in said:
        return None
    if _version(said.get("sae_lens_version")) >= _UNPROCESSED_SINCE:
        return None
    return (
        "The SAE does not say how the model's weights were processed: SAELens before 3.19.2 took "
        "TransformerLens' default, which centres them (center_writing_weights); here the model is "
        "as it was published, so the results may be below what it can do."
    )


def _bos(value: Any, here: Here, said: Said) -> str | None:
    if value is not False:
        return None
    return (
        "The SAE was made on contexts without a leading BOS (prepend_bos=False); here every "
        "context starts with one, which is not measured but which all other tokens see."
    )


def _special_tokens(value: Any, here: Here, said: Said) -> str | None:
    # True, the tokenizer's special tokens, is what is left out here; False (all were trained on)
    # only means that it could do more than is measured.
    listed = value if isinstance(value, list) else []
    more = sorted({i for i in listed if type(i) is int} - here.masked)
    if not more:
        return None
    return (
        f"The SAE was not trained on the tokens {_word(more)} (exclude_special_tokens), which are "
        "measured here; model.extra_masked_ids leaves them out."
    )


def _positions(value: Any, here: Here, said: Said) -> str | None:
    size = said.get("context_size")
    size = size if type(size) is int and 0 < size <= 32768 else here.context_size
    if not value:
        return None
    try:
        trained = range(size)[slice(*value)]
    except (TypeError, ValueError):
        return f"The SAE was made on the positions {_word(value)} (seqpos_slice); here on all."
    # Position 0 is BOS, which is not measured.
    if {*range(1, size)} <= {*trained}:
        return None
    ends = f"{trained[0]} to {trained[-1]}" if trained else "none"
    step = f", every {trained.step}th" if trained.step != 1 else ""
    return (
        f"The SAE was made on the positions {ends}{step} of contexts of {size} tokens "
        f"(seqpos_slice={_word(value)}); here on all but the first."
    )


def _context_size(value: Any, here: Here, said: Said) -> str | None:
    if type(value) is not int or value == here.context_size:
        return None
    later = "with positions that it never saw" if value < here.context_size else "shorter ones"
    return (
        f"The SAE was made on contexts of {value} tokens and is measured on contexts of "
        f"{here.context_size}, {later} (dataset.context_size)."
    )


def _text(value: Any, here: Here, said: Said) -> str | None:
    if not value or any(_same_name(value, name) for name in here.dataset):
        return None
    return (
        f"The SAE was made on text of {_word(value)} and is measured on {here.dataset[-1]}: other "
        "text has other features."
    )


def _chat(value: Any, here: Here, said: Said) -> str | None:
    if value is not True:
        return None
    return (
        "The SAE was made on conversations in the model's chat format (use_chat_formatting); here "
        "text stands as the dataset has it."
    )


def _one_document(value: Any, here: Here, said: Said) -> str | None:
    if value is not True:
        return None
    return (
        "The SAE was made on contexts of one document each (disable_concat_sequences); here a "
        "context can hold several, with a BOS between them."
    )


def _separator(value: Any, here: Here, said: Said) -> str | None:
    if value == "bos" or (value == "eos" and here.eos_is_bos) or value in [*here.masked]:
        return None
    if said.get("disable_concat_sequences") is True:
        return None
    return (
        f"The SAE was made on documents parted by {_word(value)} (sequence_separator_token); here "
        "a BOS stands between them."
    )


def _sae_dtype(value: Any, here: Here, said: Said) -> str | None:
    if _plain(value) not in _HALF:
        return None
    return f"The SAE was computed in {_plain(value)} where it was made (dtype); here in float32."


def _autocast(value: Any, here: Here, said: Said) -> str | None:
    if value is not True or here.dtype in _HALF:
        return None
    return (
        "The SAE was made on activations of a model in mixed precision (autocast_lm); here the "
        f"model runs in {here.dtype} (model.dtype)."
    )


def _model_dtype(value: Any, here: Here, said: Said) -> str | None:
    given = value if isinstance(value, dict) else {}
    made = _plain(given.get("dtype") or given.get("torch_dtype") or here.dtype)
    if made in (here.dtype, "auto"):
        return None
    return (
        f"The SAE was made on activations of a model in {_word(made)}; here the model runs in "
        f"{here.dtype} (model.dtype)."
    )


def _normalised(value: Any, here: Here, said: Said) -> str | None:
    # What the SAE itself would do with its input was understood or refused when it was loaded;
    # here it is the word of the runner's configuration.
    if value not in ("constant_norm_rescale", "layer_norm", "covariance_whitening"):
        return None
    return (
        f"The SAE was made on normalised activations (normalize_activations={value}); here it "
        "gets them as they are."
    )


def _batchtopk(value: Any, here: Here, said: Said) -> str | None:
    if value not in _BATCHTOPK:
        return None
    return _threshold("is a BatchTopK one", said)


def _shared_threshold(value: Any, here: Here, said: Said) -> str | None:
    # Older folders do not say how it was trained; BatchTopK is saved as a JumpReLU.
    if value is not True or said.get("training_architecture") is not None:
        return None
    return _threshold("has one threshold for all features, as a BatchTopK one", said)


def _threshold(what: str, said: Said) -> str | None:
    made_by = said.get("sae_lens_training_version") or said.get("sae_lens_version")
    if _version(made_by) >= _THRESHOLD_FOLDED_SINCE:
        return None
    if said.get("rescale_acts_by_decoder_norm") is False:
        return None
    if said.get(TRAINED_ON) not in (None, "expected_average_only_in"):
        return None
    told = f"SAELens {_word(made_by)}" if made_by else "a SAELens that it does not name"
    return (
        f"The SAE {what}, saved by {told}: before 6.54.9 the threshold that is saved was off by "
        "the activations' factor after training with "
        "normalize_activations=expected_average_only_in and rescale_acts_by_decoder_norm=True, "
        "and L0 is then far from its k. Look at L0 before anything else."
    )


def _unknown(value: Any, here: Here, said: Said) -> str | None:
    if not value:
        return None
    return (
        f"The SAE's configuration has keys that are not known here ({_word(', '.join(value))}): if "
        "they change what it computes, it is computed as another."
    )


ROWS = (
    _Row("model_name", _model),
    _Row("hook_name", _hook),
    _Row("model_class_name", _model_class),
    _Row("model_from_pretrained_kwargs", _weights),
    _Row(WITHOUT_METADATA, _weights_unsaid),
    _Row("model_from_pretrained_kwargs", _model_dtype),
    _Row("autocast_lm", _autocast),
    _Row("dtype", _sae_dtype),
    _Row(TRAINED_ON, _normalised),
    _Row("prepend_bos", _bos),
    _Row("exclude_special_tokens", _special_tokens),
    _Row("seqpos_slice", _positions),
    _Row("context_size", _context_size),
    _Row("use_chat_formatting", _chat),
    _Row("disable_concat_sequences", _one_document),
    _Row("sequence_separator_token", _separator),
    _Row("dataset_path", _text),
    _Row("training_architecture", _batchtopk),
    _Row(ONE_THRESHOLD, _shared_threshold),
    _Row(UNKNOWN, _unknown),
)


# -------------------------------------------------------------------------------- words


def hub_name(name: str) -> str:
    """TransformerLens' short names (gpt2-small, gemma-2-2b) as the hub has them."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return get_official_model_name(name)
    except ValueError:
        return name


def _same_name(made: Any, here: str) -> bool:
    """Whether two names of the hub can be one; one of them may leave out the owner."""
    made, here = str(made).casefold().rstrip("/"), here.casefold().rstrip("/")
    if ("/" in made) != ("/" in here):
        made, here = made.rpartition("/")[2], here.rpartition("/")[2]
    return made == here


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _version(value: Any) -> tuple[int, ...]:
    """The first three numbers of a version; () for what is none."""
    numbers = []
    for text in (value if isinstance(value, str) else "").split(".")[:3]:
        digits = text[: next((i for i, c in enumerate(text) if not c.isdigit()), len(text))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _word(value: Any) -> str:
    """A foreign file's word on one line, and not a long one."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
