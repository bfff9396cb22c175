"""Features whose consistency is known beforehand: [contexts, positions, features], float64."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def white_noise(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ar1(
    n_contexts: int, n_positions: int, n_features: int, phi: float, generator: torch.Generator
) -> Tensor:
    """Stationary first-order autoregression of variance 1: rho(k) = phi ** k."""
    noise = white_noise(n_contexts, n_positions, n_features, generator=generator)
    values = noise.clone()
    for t in range(1, n_positions):
        values[:, t] = phi * values[:, t - 1] + (1 - phi**2) ** 0.5 * noise[:, t]
    return values


def ar1_window_consistency(phi: float, window: int) -> float:
    total = sum((window - k) * phi**k for k in range(1, window))
    return 2 * total / (window * (window - 1))


def periodic_runs(
    n_contexts: int,
    n_positions: int,
    n_features: int,
    on: int,
    off: int,
    generator: torch.Generator,
) -> Tensor:
    """Runs of exactly `on` ones between exactly `off` zeros, with a random phase."""
    phase = torch.randint(on + off, (n_contexts, 1, n_features), generator=generator)
    clock = torch.arange(n_positions)[None, :, None] + phase
    return (clock % (on + off) < on).double()


def markov_runs(
    n_contexts: int,
    n_positions: int,
    n_features: int,
    stay_on: float,
    stay_off: float,
    generator: torch.Generator,
) -> Tensor:
    """Stationary two-state chain: P(on | on) = stay_on, P(on | off) = 1 - stay_off."""
    uniform = torch.rand(
        n_contexts, n_positions, n_features, generator=generator, dtype=torch.float64
    )
    on = torch.zeros_like(uniform)
    on[:, 0] = (uniform[:, 0] < (1 - stay_off) / (2 - stay_on - stay_off)).double()
    for t in range(1, n_positions):
        chance = torch.where(on[:, t - 1] > 0, stay_on, 1 - stay_off)
        on[:, t] = (uniform[:, t] < chance).double()
    return on


def token_local(
    n_contexts: int, n_positions: int, n_features: int, density: float, generator: torch.Generator
) -> Tensor:
    """Sparse, and independent from token to token: rho(k) = 0, persistence 0."""
    shape = (n_contexts, n_positions, n_features)
    fires = torch.rand(*shape, generator=generator) < density
    return fires * (0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64))


def position_trend(n_contexts: int, n_positions: int, n_features: int) -> Tensor:
    """The same rise over positions in every context: everything is position."""
    ramp = torch.linspace(0.1, 3.0, n_positions, dtype=torch.float64)
    return ramp[None, :, None].repeat(n_contexts, 1, n_features)


def random_masks(
    n_contexts: int,
    n_positions: int,
    generator: torch.Generator,
    *,
    invalid: float = 0.15,
    boundary: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Segments that change, and positions that are masked, at the rates given."""
    shape = (n_contexts, n_positions)
    segments = (torch.rand(*shape, generator=generator) < boundary).long().cumsum(1)
    return segments, torch.rand(*shape, generator=generator) >= invalid


def random_splits(n_contexts: int, n_parts: int, generator: torch.Generator) -> list[int]:
    """Sizes of `n_parts` batches, at least 1 each, that add up to `n_contexts`."""
    cuts = torch.randperm(n_contexts - 1, generator=generator)[: n_parts - 1].sort().values + 1
    bounds = [0, *cuts.tolist(), n_contexts]
    return [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
