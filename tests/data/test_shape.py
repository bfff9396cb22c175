"""A config.json says how large a model is, and up to where it knows positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tcsae.base.errors import UserError
from tcsae.data.shape import positions_are_learned, read_shape

SIZE = {"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 10}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 16}


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("said", "positions"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 64}, 64),
        ({"max_seq_len": 64}, 64),
        ({"seq_length": 64}, 64),
        ({}, None),
        ({"max_position_embeddings": 64, "sliding_window": 8}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": None}, 64),
        # Stretched: by how much, from what, or the whole said already.
        ({"max_position_embeddings": 64, "rope_scaling": LINEAR}, 256),
        ({"max_position_embeddings": 64, "rope_scaling": YARN}, 256),
        ({"max_position_embeddings": 256, "rope_parameters": YARN}, 256),
        ({"max_position_embeddings": 256, "rope_scaling": LLAMA3}, 256),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": LINEAR}}, 256),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_positions_are_those_of_training_or_of_the_stretch(
    tmp_path: Path, said: dict[str, Any], positions: int | None, nested: bool
) -> None:
    content = SIZE | said
    shape = read_shape(write(tmp_path, {"text_config": content} if nested else content))
    assert shape == (2, 8, 10, positions)


@pytest.mark.parametrize(
    ("said", "learned"),
    [
        ({"model_type": "gpt2", "n_positions": 64}, True),
        ({"model_type": "opt", "max_position_embeddings": 64}, True),
        ({"model_type": "bert", "position_embedding_type": "absolute"}, True),
        ({"model_type": "own"}, True),  # which nothing is known of
        ({"model_type": "llama", "rope_theta": 1e4}, False),
        ({"model_type": "llama"}, False),  # whose older files do not say it
        ({"model_type": "gptj", "rotary_dim": 4}, False),
        ({"model_type": "falcon", "alibi": True}, False),
        ({"model_type": "bloom"}, False),
        ({"model_type": "mpt", "max_seq_len": 64}, False),
        ({"model_type": "own", "position_embedding_type": "rope"}, False),
    ],
)
def test_a_table_of_positions_is_told_from_angles_and_distances(
    tmp_path: Path, said: dict[str, Any], learned: bool
) -> None:
    assert positions_are_learned(write(tmp_path, said)) is learned


@pytest.mark.parametrize("content", [[], 3, {}, {"text_config": 3}, {"vocab_size": "10"}])
def test_a_config_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match="it is no decoder's config"):
        read_shape(write(tmp_path, content))


@pytest.mark.parametrize("said", [{"num_hidden_layers": 0}, {"vocab_size": -1}])
def test_sizes_of_nothing_are_refused(tmp_path: Path, said: dict[str, int]) -> None:
    with pytest.raises(UserError, match="no such model"):
        read_shape(write(tmp_path, SIZE | said))
