"""Learning rate, warm-ups and the update itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tcsae.config import TrainingConfig
from tcsae.products import products_for
from tcsae.products.plain import Adam


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


class _Decoder(NamedTuple):
    weight: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor


class FusedAdam(torch.optim.Adam):
    """Adam in its fused form, the gradients' clipping folded into the one pass over the weights.

    torch.optim.Adam(fused=True) makes a contiguous copy of a weight that lies in memory by column,
    as W_enc does; here it is given as its transpose.
    """

    max_norm: float | None = None
    """Of all gradients together, after which they are scaled down; None: they are not."""
    decoder: nn.Parameter | None = None
    """A weight whose rows keep norm 1: its gradient loses its part along them and they are
    normalised in the same pass. None: nothing of it is done here."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            names: tuple[list[Any], ...] = ([], [], [], [], [], [])
            self._init_group(group, *names)
            parameters, gradients, means, squares, _, steps = names
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            decoder, squared = self._take_out(names), None
            if decoder is not None:
                products = products_for(decoder.weight.device)
                along_F, squared_F = products.row_gradient(decoder.weight, decoder.grad)
                squared = squared_F.sum()
            divisor = self._divisor(gradients, squared)
            torch._fused_adam_(
                _by_row(parameters),
                _by_row(gradients),
                _by_row(means),
                _by_row(squares),
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
                found_inf=None,
            )
            if decoder is not None:
                adam = Adam(
                    decoder.mean, decoder.square, decoder.step, group["lr"], (beta1, beta2),
                    group["eps"], divisor,
                )  # fmt: skip
                products.update_rows(decoder.weight, decoder.grad, along_F, adam)

    def _take_out(self, names: tuple[list[Any], ...]) -> _Decoder | None:
        """The decoder's part of Adam's lists, no longer in them."""
        if self.decoder is None:
            return None
        parameters, gradients, means, squares, _, steps = names
        at = next(i for i, parameter in enumerate(parameters) if parameter is self.decoder)
        lists = (parameters, gradients, means, squares, steps)
        return _Decoder(*(part.pop(at) for part in lists))

    def _divisor(self, gradients: list[Tensor], more: Tensor | None) -> Tensor | None:
        """What clipping divides every gradient by, as torch.nn.utils.clip_grad_norm_ has it; `more`
        is the squared norm of gradients that are not among them."""
        if self.max_norm is None:
            return None
        norms = torch.stack(torch._foreach_norm(gradients))
        norm = norms.norm() if more is None else (norms.square().sum() + more).sqrt()
        return ((norm + 1e-6) / self.max_norm).clamp_(min=1)


def _by_row(tensors: list[Tensor]) -> list[Tensor]:
    """Views in which rows lie one after another."""
    return [tensor if tensor.is_contiguous() else tensor.T for tensor in tensors]


def build_optimizer(module: nn.Module, cfg: TrainingConfig) -> FusedAdam:
    """Adam with the configured rate, betas and clipping."""
    optimizer = FusedAdam(module.parameters(), lr=cfg.lr, betas=cfg.adam_betas, fused=True)
    optimizer.max_norm = cfg.grad_clip
    return optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, for a checkpoint."""
    return {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state that `optimizer_tensors` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        # The fused form reads parameter and moments side by side: both must lie alike in memory.
        moment = torch.empty_like(like) if value.shape == like.shape else torch.empty_like(value)
        state.setdefault(int(index), {})[name] = moment.copy_(value)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
