"""A model's size, from its config.json, whose keys differ between families; nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tcsae.base.errors import UserError
from tcsae.base.files import read_json


class Shape(NamedTuple):
    n_layers: int
    d_in: int
    vocabulary: int
    positions: int | None
    """As many as the model was made for; None: the config does not say."""


_KEYS = (
    ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    ("hidden_size", "n_embd", "d_model", "dim"),
    ("vocab_size",),
)
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_OPEN = ("rope", "rotary", "alibi", "partial_rotary")
_OPEN_BY_CLASS = ("bloom", "mpt", "jamba", "bamba")
"""Families that weigh by distance, or have no positions, and whose config has no key for it."""


def read_shape(path: Path) -> Shape:
    """From a config.json. Raises UserError for one that is no decoder's."""
    config = _of_text(read_json(path))
    found = []
    for keys in _KEYS:
        values = [config[key] for key in keys if isinstance(config.get(key), int)]
        if not values:
            raise UserError(f"{path} has none of {', '.join(keys)}: it is no decoder's config")
        if values[0] < 1:
            raise UserError(f"{path} has {values[0]} as one of {', '.join(keys)}: no such model")
        found.append(values[0])
    n_layers, d_in, vocabulary = found
    return Shape(n_layers, d_in, vocabulary, _positions(config))


def positions_are_learned(path: Path) -> bool:
    """Whether there is one vector for each position, and so none for a later one.

    What rotates, or weighs by distance, has a value at any position.
    """
    config = _of_text(read_json(path))
    if _is_open(config):
        return False
    from transformers import AutoConfig

    try:  # Files say only what differs from the class's defaults, among them older Llamas' angles.
        whole = AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False).to_dict()
    except Exception:  # it does not load, which is said where it is loaded
        return True
    return not _is_open(_of_text(whole))


def _of_text(config: Any) -> dict[str, Any]:
    """The part of a config that describes the language model."""
    config = config if isinstance(config, dict) else {}
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def _is_open(config: dict[str, Any]) -> bool:
    kind = config.get("position_embedding_type")
    return (
        any(key.startswith(_OPEN) for key in config)
        or config.get("model_type") in _OPEN_BY_CLASS
        or isinstance(kind, str)
        and kind.startswith(_OPEN)
    )


def _positions(config: dict[str, Any]) -> int | None:
    """Those it was trained on, or was stretched to: by a factor, from an original number."""
    said = next((config[key] for key in _POSITIONS if isinstance(config.get(key), int)), None)
    if said is None:
        return None
    stretched = [said]
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, dict):
            # Of each kind of layer, or of all.
            for part in (value, *(v for v in value.values() if isinstance(v, dict))):
                factor, origin = part.get("factor"), part.get("original_max_position_embeddings")
                if isinstance(factor, int | float):
                    stretched.append(int(factor * (origin if isinstance(origin, int) else said)))
    return max(stretched)
