"""How many windows of consecutive positions hold two positions of a context, without a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class WindowCounts(NamedTuple):
    """Of windows of `window` positions that are allowed or not, by context and position [B, T].

    Windows that hold both u <= t start from t - W + 1 to u. Both counts only grow with the
    position, so those that hold both are min(up_to) - max(before), or none.
    """

    window: int
    up_to_BT: Tensor
    """Allowed windows that start at most there."""
    before_BT: Tensor
    """Allowed windows that end before there."""

    @classmethod
    def of(cls, window: int, allowed_BS: Tensor, dtype: torch.dtype) -> WindowCounts:
        """`allowed_BS` [B, T - W + 1] by first position."""
        before_BT = nn.functional.pad(allowed_BS.to(dtype).cumsum(-1), (1, 0))
        padding = window - 1
        up_to_BT = nn.functional.pad(before_BT[:, None, 1:], (0, padding), mode="replicate")[:, 0]
        return cls(window, up_to_BT, nn.functional.pad(before_BT[:, :-1], (padding, 0)))

    def laplacian(self) -> Tensor:
        """[B, T, T]: the sum over windows of (I - 1 1^T / W) / (W - 1)."""
        matrix = torch.minimum(self.up_to_BT[:, :, None], self.up_to_BT[:, None, :])
        matrix.sub_(torch.maximum(self.before_BT[:, :, None], self.before_BT[:, None, :]))
        matrix.clamp_(min=0)
        diagonal_BT = matrix.diagonal(dim1=-2, dim2=-1)
        n_windows_BT = diagonal_BT.clone()
        matrix.div_(-self.window * (self.window - 1))
        diagonal_BT.add_(n_windows_BT / (self.window - 1))
        return matrix

    def diagonal(self) -> Tensor:
        """[B, T]: the laplacian's."""
        n_windows_BT = self.up_to_BT - self.before_BT
        shared_BT = n_windows_BT / (-self.window * (self.window - 1))
        return shared_BT + n_windows_BT / (self.window - 1)
