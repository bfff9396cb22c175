"""Learning rate, warm-ups and the update itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcsae.config import TrainingConfig


def ramp(step: int, steps: int, share: float) -> float:
    """Rises linearly from above 0 to 1 over the first `share` of the steps."""
    length = round(share * steps)
    return 1.0 if step >= length else (step + 1) / (length + 1)


def learning_rate(step: int, steps: int, cfg: TrainingConfig) -> float:
    """Warm-up, plateau, and a linear fall towards 0 over the last `lr_decay` of the steps."""
    length = round(cfg.lr_decay * steps)
    left = steps - step
    fall = 1.0 if left > length else left / (length + 1)
    return cfg.lr * ramp(step, steps, cfg.lr_warmup) * fall


def build_optimizer(module: nn.Module, cfg: TrainingConfig) -> torch.optim.Adam:
    """Adam in its fused form (one pass over the parameters), on every device that has it."""
    return torch.optim.Adam(
        module.parameters(), lr=cfg.lr, betas=cfg.adam_betas, fused=True
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, for a checkpoint."""
    return {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Exactly what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
