"""What the tests of all architectures share: small SAEs, batches, and data from a dictionary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from tcsae.config.sae import architectures, config_class
from tcsae.sae import sae_class
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import TrainingOutput

D_IN, D_SAE = 10, 64  # at k = 4 topk takes its sparse path
# A kernel so wide that every threshold has entries near it in a small batch.
WIDE = {"bandwidth": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "p_anneal": {},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "jumprelu": WIDE,
    "jumprelu, tanh": {**WIDE, "penalty": "tanh", "preact_coefficient": 1e-6},
    "gated": {},
    "matryoshka": {"k": 4},
    "matryoshka, token": {"k": 4, "selection": "token"},
    "tsae": {"k": 4},
    "tsae, inner product": {"k": 4, "pair_loss": "inner_product", "pairs": "earlier"},
    "persistent": {"k": 4},
    "tfa": {"k": 4, "n_heads": 2, "bottleneck_factor": 4},
    "tfa, predictive": {"k": 4, "n_heads": 2, "bottleneck_factor": 4, "codes": "predictive"},
}
"""Every architecture, with options that suit a small SAE; the name ends at the comma."""
ALONE: dict[str, dict[str, Any]] = {"tsae": {"pair_coefficient": 0.0}}
"""Options, by architecture, under which no loss looks at a token's neighbours."""

SEQUENTIAL = [name for name in VARIANTS if sae_class(name.partition(",")[0]).sequential]
"""Those whose codes depend on the tokens before."""
TWO_PARTS = [name for name in VARIANTS if name.startswith("tfa")]
"""Those whose reconstruction has a part beside that of the features."""

every_architecture = pytest.mark.parametrize("name", architectures())
every_variant = pytest.mark.parametrize("name", VARIANTS)
few_examples = settings(max_examples=25, deadline=None)


def build(name: str, d_in: int = D_IN, seed: int = 0, **options: Any) -> SparseAutoencoder:
    """A new SAE of an architecture or variant."""
    architecture = name.partition(",")[0]
    cfg = config_class(architecture)(**{"d_sae": D_SAE, **VARIANTS[name], **options})
    return sae_class(architecture)(cfg, d_in, torch.Generator().manual_seed(seed))


@torch.no_grad()
def disturb(sae: SparseAutoencoder, size: float, seed: int = 0) -> SparseAutoencoder:
    """Random biases, thresholds and encoder, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        if name != "W_dec":
            parameter += size * torch.randn(parameter.shape, generator=generator)
    sae.constrain()
    selects_by_token = getattr(sae.cfg, "selection", "batch") == "token"
    if "threshold" in dict(sae.named_buffers()) and not selects_by_token:
        sae.threshold.fill_(size)
    return sae


def make(name: str, seed: int = 0, biased: bool = True, **options: Any) -> SparseAutoencoder:
    """A small SAE; `biased`: disturbed."""
    sae = build(name, seed=seed, **options)
    return disturb(sae, 0.2, seed) if biased else sae


def biases(sae: SparseAutoencoder) -> list[torch.nn.Parameter]:
    """The encoder's biases: b_enc, or b_gate and b_mag."""
    return [p for name, p in sae.named_parameters() if name.startswith("b_") and name != "b_dec"]


def batch(seed: int = 0, contexts: int = 3, positions: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(contexts, positions, D_IN, generator=generator) + 0.5
    valid_BT = torch.rand(contexts, positions, generator=generator) > 0.3
    valid_BT[0, :2] = torch.tensor([False, True])
    return x_BTD, valid_BT


def dead_at(*features: int) -> Tensor:
    return torch.zeros(D_SAE, dtype=torch.bool).index_fill_(0, torch.tensor(features).long(), True)


def train_pass(
    sae: SparseAutoencoder, x_BTD: Tensor, valid_BT: Tensor, dead_F: Tensor | None = None
) -> tuple[TrainingOutput, dict[str, Tensor]]:
    """The output and the gradients, by parameter name, of the sum of the losses."""
    sae.zero_grad()
    dead_F = dead_at() if dead_F is None else dead_F
    output = sae.training_forward(
        x_BTD,
        valid_BT,
        sparsity_warmup=1.0,
        dead_F=dead_F,
        progress=0.5,
        generator=torch.Generator().manual_seed(0),
    )
    sum(output.losses.values()).backward()
    return output, {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}


def sparse_data(n: int, seed: int, n_true: int = 16, active: float = 0.125) -> Tensor:
    """[n, D_IN] tokens: sparse positive mixtures of `n_true` random directions."""
    generator = torch.Generator().manual_seed(1234)
    directions = torch.nn.functional.normalize(
        torch.randn(n_true, D_IN, generator=generator), dim=1
    )
    generator.manual_seed(seed)
    on = torch.rand(n, n_true, generator=generator) < active
    return (on * (1 + torch.rand(n, n_true, generator=generator))) @ directions * 2 + 1.0


def fit(sae: SparseAutoencoder, steps: int, n_true: int = 16, dead: Tensor | None = None) -> Tensor:
    """Train on sparse_data; the last step at which each feature fired, -1 if it never did.

    A feature counts as dead after 10 steps without firing, those in `dead` from the start.
    """
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    valid_BT = torch.ones(16, 16, dtype=torch.bool)
    fired_at, quiet = torch.full((D_SAE,), -1), torch.zeros(D_SAE)
    quiet[[] if dead is None else dead] = 99
    for step in range(steps):
        x_BTD = sparse_data(256, step, n_true, active=2 / n_true).view(16, 16, D_IN)
        output = sae.training_forward(
            x_BTD, valid_BT, sparsity_warmup=1.0, dead_F=quiet > 10, progress=step / steps
        )
        optimizer.zero_grad()
        sum(output.losses.values()).backward()
        sae.project_decoder_gradient()
        optimizer.step()
        sae.constrain()
        sae.after_step(output.codes, progress=step / steps)
        fired = (output.features > 0).flatten(0, 1).any(0)
        fired_at[fired] = step
        quiet = torch.where(fired, 0, quiet + 1)
        if sae.cfg.revival == "resample" and step % 20 == 19:
            generator = torch.Generator().manual_seed(step)
            sae.revive(quiet > 10, optimizer, x_BTD.flatten(0, 1), generator)
    return fired_at


def explained_variance(sae: SparseAutoencoder) -> float:
    x_ND = sparse_data(4096, seed=99_999)
    with torch.no_grad():
        error = (x_ND - sae(x_ND)).square().sum()
    return 1 - (error / (x_ND - x_ND.mean(0)).square().sum()).item()
