"""`training.target_l0`: a controller moves the sparsity coefficient until L0 is the target.

With e = ln(L0) - ln(reference), smoothed over some steps and looked at HORIZON of the run ahead,
along its present slope,

    coefficient = its configured value * exp(PROPORTIONAL * e + integral),

a PID controller in logarithms: L0 falls about as a power of the coefficient, so the same gains
serve any target and any configured value. The reference goes from the first L0 to the target,
geometrically, over the first REACHED of the run: L0 follows a coefficient only as fast as the
learning rate lets the weights move, and without a reachable reference the controller would wind up
and overshoot. For the same reason the integral grows only where the error is small, or where L0 no
longer moves: with a coefficient configured far off, the rest can balance at an error above any
limit, and only the integral gets it out. The gains are
those of a learning rate of 1e-3, at which L0 answers after some 40 steps: a controller that asks
for more in the meantime swings the coefficient by a factor of ten and ends wherever the run does.
At a lower rate it answers more slowly, and the gains are higher by as much, within reason. At a
higher one they stay as they are: an L0 that answers sooner is no harder to steer, and with a third
of the gains (at 3e-3) the integral, wound up on the way down, was not unwound when the run ended:
4 to 10 % below the target.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PROPORTIONAL = 1.5
INTEGRAL = 15.0
"""Over the whole run, for an error of 1."""
HORIZON = 0.01
OF_RATE, HIGHEST_SCALE = 1e-3, 8 / 3
"""The learning rate that the three above are for, and how many times higher they are at most."""
QUICKEST = 2.0
"""How many times higher the integral is at a higher rate, at most: L0 falls by itself as features
learn, a drift that only the integral answers, and where L0 answers sooner it may."""
REACHED = 0.3
SMOOTHING = 0.8
LARGEST_ERROR = 2.0
INTEGRATED_ERROR = 0.5
BALANCED_FROM, CLOSING = 0.4, 0.2
"""From this share of the run on, an error that would take this share of it to close counts too."""


class L0Controller:
    """The controller of one run of `steps` steps; nothing in it synchronises with the device."""

    def __init__(self, target: float, steps: int, device: str, lr: float = OF_RATE) -> None:
        self.target, self.steps = math.log(target), steps
        self.scale = min(max(OF_RATE / lr, 1.0), HIGHEST_SCALE)
        self.integral = self.scale * INTEGRAL * min(max(lr / OF_RATE, 1.0), QUICKEST)
        nan, zero = torch.full((), math.nan, device=device), torch.zeros((), device=device)
        self.state = {"first": nan, "log_l0": nan, "slope": zero, "integral": zero}

    def _error(self, step: int) -> Tensor:
        """e of the module's docstring; 0 before the first observation."""
        share = min(step / (REACHED * self.steps), 1.0)
        first = self.state["first"]
        reference = (1 - share) * first + share * self.target
        reference_slope = (self.target - first) / (REACHED * self.steps) if share < 1 else 0.0
        ahead = self.scale * HORIZON * self.steps * (self.state["slope"] - reference_slope)
        error = self.state["log_l0"] - reference + ahead
        return error.nan_to_num(0.0).clamp(-LARGEST_ERROR, LARGEST_ERROR)

    def multiplier(self, step: int) -> Tensor:
        """Scalar for the sparsity coefficient of step number `step`."""
        gain = self.scale * PROPORTIONAL
        return (gain * self._error(step) + self.state["integral"]).exp()

    def observe(self, step: int, l0: Tensor) -> None:
        """Take note of the mean number of active features per valid token at step number `step`."""
        log_l0 = l0.clamp(min=0.1).log()
        before = torch.where(self.state["log_l0"].isnan(), log_l0, self.state["log_l0"])
        smooth = SMOOTHING * before + (1 - SMOOTHING) * log_l0
        slope = SMOOTHING * self.state["slope"] + (1 - SMOOTHING) * (smooth - before)
        first = torch.where(self.state["first"].isnan(), log_l0, self.state["first"])
        self.state |= {"first": first, "log_l0": smooth, "slope": slope}
        error = self._error(step + 1)
        is_small = error.abs() < INTEGRATED_ERROR
        grown = torch.where(is_small, error, error.clamp(-1, 1) * self._balanced(step + 1, error))
        gain = self.integral / self.steps
        self.state["integral"] = self.state["integral"] + gain * grown

    def _balanced(self, step: int, error: Tensor) -> Tensor:
        """From 0, L0 is on its way to the reference, to 1, it stands still."""
        if step < BALANCED_FROM * self.steps:
            return torch.zeros_like(error)
        closed = -self.state["slope"] * (CLOSING * self.steps) / error
        return (4 * (1 - closed)).clamp(0, 1)

    def load(self, state: dict[str, Tensor]) -> None:
        """Exactly the state that was saved."""
        self.state = {k: state[k].to(v.device, copy=True) for k, v in self.state.items()}
