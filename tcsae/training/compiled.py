"""`training.compile`: the forward pass through torch.compile, and without it where that fails.

For GPUs, where it makes one kernel of many elementwise ones; not measured. On a CPU the passes of
tcsae/sae/fast.py are written out already and call kernels that the compiler does not take. A
failure is one warning with the compiler's error, and training goes on as without: a pass changes
nothing, so that it can be made again. Rounding differs from the plain pass, nothing else.
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
        if self._compiled is not None:
            try:
                # A number that changes from step to step would be compiled in, each anew.
                warmup = torch.as_tensor(sparsity_warmup)
                return self._compiled(*args, sparsity_warmup=warmup, **named)
            # The compiler raises types of many libraries. An error of the pass itself comes again
            # below, as its own and without a word about the compiler.
            except Exception as error:
                result = self._plain(*args, sparsity_warmup=sparsity_warmup, **named)
                self._compiled = None
                log.warning(
                    "training.compile=true has no effect: torch.compile failed with "
                    f"{type(error).__name__}: {_one_line(error)}; training goes on without it"
                )
                return result
        return self._plain(*args, sparsity_warmup=sparsity_warmup, **named)


def _one_line(error: Exception) -> str:
    """The compiler's first line may say no more than who raised: the beginning of all of them."""
    return " ".join(str(error).split())[:200] or "no message"
