"""`training.compile`: the forward pass through torch.compile, and without it where that fails.

For GPUs, where it makes one kernel of many elementwise ones; not measured. On a CPU the passes of
tcsae/sae/fast.py are written out already and call kernels that the compiler does not take: it says
so, once, and training goes on as without. Rounding differs from the plain pass, nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger(__name__)


class CompiledForward:
    """`forward`, compiled at its first call; itself again for good once the compiler gave up.

    Args:
        forward: of an SAE, keyword arguments as `SparseAutoencoder.training_forward`.
        backend: of torch.compile.
    """

    def __init__(self, forward: Callable[..., Any], backend: Any = "inductor") -> None:
        self._plain = forward
        self._compiled: Callable[..., Any] | None = torch.compile(forward, backend=backend)

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def __call__(self, *args: Any, sparsity_warmup: Any, **named: Any) -> Any:
        if self._compiled is None:
            return self._plain(*args, sparsity_warmup=sparsity_warmup, **named)
        try:
            # A number that changes from step to step would be compiled in, each anew.
            return self._compiled(*args, sparsity_warmup=torch.as_tensor(sparsity_warmup), **named)
        # The compiler raises types of many libraries, and every one means: without it.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            log.warning(
                f"training.compile: torch.compile gave up ({type(error).__name__}: {reason}); "
                "training goes on without it"
            )
            self._compiled = None
            return self(*args, sparsity_warmup=sparsity_warmup, **named)
