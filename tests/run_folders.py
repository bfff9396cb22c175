"""Run folders without training: planted codes and errors, measured and written by the package."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcsae.base.files import write_json
from tcsae.base.json_numbers import plain
from tcsae.config import parse
from tcsae.measure.evaluation import Evaluation, _per_context
from tcsae.metrics.layout import LayoutShare
from tcsae.metrics.reconstruction import ForwardScore, ModelMetrics, ReconstructionMetrics
from tcsae.metrics.saebench_json import (
    Provenance,
    saebench_core_json,
    saebench_eval_config,
    weight_statistics,
)
from tcsae.metrics.suite import ConsistencySuite
from tcsae.sae.formats.saelens import save_saelens
from tcsae.sae.registry import sae_class

N, T, F, D_IN = 24, 16, 12, 6

CONFIG: dict[str, Any] = {
    "seed": 0,
    "layer": 1,
    "window": 4,
    "lambda": 0.0,
    "model": {"name": "test/tiny", "n_layers": 3},
    "dataset": {"name": "files", "source": "files", "path": "text", "context_size": T},
    "sae": {"architecture": "topk", "d_sae": F, "k": 4},
    "consistency": {"form": "scale_free"},
    "training": {"tokens": 1000, "lr": 0.001},
    "evaluation": {"max_lag": 8, "windows": [2, 4, 8], "bootstrap": 200},
    "store": {"dir": "store"},
    "tracking": {},
}


def changed(**changes: Any) -> dict[str, Any]:
    """CONFIG with some values changed; keys with __ for the dot, lambda_ for lambda."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        node = config
        *path, last = key.replace("lambda_", "lambda").split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return config


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(seed: int = 0, n_contexts: int = N) -> Tensor:
    """x [N, T, d_in]: the same held-out activations for every run."""
    return torch.randn(n_contexts, T, D_IN, generator=seeded(seed))


def codes(phi: float = 0.0, *, l0: int = 4, seed: int = 0, n_contexts: int = N) -> Tensor:
    """[N, T, F]: the `l0` largest of F autoregressions with coefficient phi."""
    noise = torch.randn(n_contexts, T, F, generator=seeded(seed))
    f = noise.clone()
    for t in range(1, T):
        f[:, t] = phi * f[:, t - 1] + (1 - phi**2) ** 0.5 * noise[:, t]
    f = f - f.min() + 0.1
    return torch.zeros_like(f).scatter(-1, f.topk(l0, -1).indices, 1) * f


def write_run(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    features: Tensor | None = None,
    error: float = 0.5,
    noise_seed: int = 1,
    ce: float = 3.5,
    x: Tensor | None = None,
    finished: bool = True,
    layout: Tensor | None = None,
) -> Path:
    """A finished run whose SAE gave `features`, and x_hat = x + error * noise; `layout` [N, T] says
    which tokens are layout (None: not measured)."""
    cfg = parse(config or CONFIG)
    x = inputs() if x is None else x
    features = codes(n_contexts=len(x)) if features is None else features
    x_hat = x + error * torch.randn(x.shape, generator=seeded(noise_seed))
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    valid[:, 0] = False
    n_features = features.shape[-1]
    reconstruction = ReconstructionMetrics(D_IN, n_features)
    reconstruction.update(x, x_hat, features, valid=valid)
    suite = ConsistencySuite(
        n_features,
        T,
        max_lag=cfg.evaluation.max_lag,
        windows=cfg.evaluation.windows,
        n_boot=cfg.evaluation.bootstrap,
    )
    suite.update(features, valid=valid, inputs=x)
    model = _behaviour(valid, ce)
    sae = sae_class(cfg.sae.architecture)(cfg.sae, D_IN, seeded(cfg.seed))
    provenance = Provenance(
        eval_config=saebench_eval_config(
            model_name=cfg.model.name,
            llm_dtype="float32",
            dataset="text",
            context_size=T,
            batch_size_prompts=8,
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=1,
        )
        | {"hook_name": f"blocks.{cfg.layer}.hook_resid_post"},
        eval_id="test",
        datetime_epoch_millis=0,
        sae_cfg_dict={},
        sae_lens_release_id="tcsae/test",
    )
    core = saebench_core_json(
        reconstruction.compute(),
        model.compute(),
        reconstruction.compute_features(),
        weight_statistics(sae.W_enc, sae.W_dec, sae.b_enc),
        provenance,
        intervals=reconstruction.compute_intervals() | model.compute_intervals(),
    )
    values = suite.per_feature()
    if layout is not None:
        shares = LayoutShare(n_features)
        shares.update(features, layout, valid)
        values["layout_share"] = shares.compute()
    scalars = {name: plain(v, 6) for name, v in values.items() if v.ndim == 1}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", cfg.dump())
    save_saelens(folder / "sae", sae, {"model_name": cfg.model.name})
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    Evaluation(
        core=core,
        consistency={"summary": suite.summary(), "per_feature": scalars},
        per_feature={k: v.float() if v.is_floating_point() else v for k, v in values.items()},
        per_context=_per_context(reconstruction, model)
        | {"document": torch.arange(len(x)), "model_context": torch.arange(len(x))},
        draws={name: value.float() for name, value in suite.draws().items()},
        by_density={name: value.float() for name, value in suite.by_density().items()},
    ).write(folder / "eval")
    if finished:
        write_json(folder / "final_info.json", {"layer": cfg.layer, "training_steps": 1})
    return folder


def _behaviour(valid: Tensor, ce: float) -> ModelMetrics:
    """The model alone at 3 nats, with the SAE at `ce`, ablated at 8; contexts differ a little."""
    metrics = ModelMetrics()
    n_B = valid.sum(1).double() - 1
    own_B = 1 + 0.1 * torch.randn(len(valid), generator=seeded(7)).double()
    sae = ForwardScore(ce * own_B * n_B, (ce - 3) * own_B * n_B)
    ablated = ForwardScore(8 * own_B * n_B, 5 * own_B * n_B)
    metrics.add(3 * own_B * n_B, sae, ablated, keep=valid)
    return metrics
