"""The one network that every number comes from: transformers' own, read and changed at one place.

TransformerLens knows where in each family's modules the tensor of a hook's name is; its own
bridge, a second network on the same weights, is not run for any result, so that what is harvested
and what a reconstruction stands in for are the same tensor to the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Replace = Callable[[Tensor], Tensor]
Growth = Callable[[int], Replace]
Logits = Callable[..., Tensor]
"""Of the same ids every time: called with nothing, or with what replaces the activations."""


class _Reached(Exception):
    """The forward pass has come by all the activations that were wanted."""


@dataclass(frozen=True)
class Place:
    """Where a hook's tensor is: what goes into a module, or comes out of it."""

    module: str
    """Its path in transformers' model."""
    is_input: bool
    factor: float = 1.0
    """What the block multiplies it by before it joins the residual stream (Granite)."""


def module_paths(model: nn.Module) -> dict[int, str]:
    """The path of each module, by its id: asked before the bridge puts its own around them."""
    return {id(module): path for path, module in model.named_modules()}


def find_place(bridge: Any, paths: dict[int, str], layer: int, hook: str) -> Place | None:
    """Where the bridge's hook point is in transformers' model; None: this block has none."""
    point = bridge.hook_dict.get(f"blocks.{layer}.{hook}")
    if point is None:
        return None
    for component in bridge.modules():
        for end in ("hook_in", "hook_out"):
            if getattr(component, end, None) is point:
                path = paths.get(id(getattr(component, "original_component", None)))
                return None if path is None else Place(path, end == "hook_in")
    return _scaled_place(bridge.blocks[layer], paths, hook)


def _scaled_place(block: Any, paths: dict[int, str], hook: str) -> Place | None:
    """TransformerLens' ScaledResidualBlockBridge: the part's output, times a number."""
    parts = {"hook_attn_out": "scaled_attn_submodule", "hook_mlp_out": "scaled_mlp_submodule"}
    name = getattr(block, parts.get(hook, ""), None)
    part = getattr(block, name, None) if name else None
    path = paths.get(id(getattr(part, "original_component", None)))
    return None if path is None else Place(path, False, block.residual_contribution_scale)


class Network:
    """A causal model of transformers, with places in it that are read, the first one replaced."""

    def __init__(self, model: Any, places: Sequence[Place | None]) -> None:
        self.model, self.places = model, places
        self._before = [] if places[0] is None else _blocks_before(model, places[0])

    def activations(self, ids_BT: Tensor, numbers: Sequence[int] = (0,)) -> dict[int, Tensor]:
        """[B, T, d] at these places, by their numbers; the forward pass ends at the last of them.
        Those that it does not come by, or where something of another form does, are not in it."""
        found: dict[int, Tensor] = {}

        def keep(number: int, x_BTD: Tensor) -> Tensor:
            # Some families add to it in place, on the way to the next one.
            found[number] = x_BTD if len(numbers) == 1 else x_BTD.clone()
            if len(found) == len(numbers):
                raise _Reached
            return x_BTD

        with contextlib.suppress(_Reached), contextlib.ExitStack() as hooks:
            for number in numbers:
                if (place := self.places[number]) is not None:
                    hooks.enter_context(self.changed(place, ids_BT, partial(keep, number)))
            self._forward(ids_BT)
        return found

    def logits(self, ids_BT: Tensor, replace: Replace | None = None) -> Tensor:
        """[B, T, vocab]; `replace` is called with the first place's activations [B, T, d]."""
        if replace is None:
            return self._forward(ids_BT)
        first = self.places[0]
        assert first is not None
        with self.changed(first, ids_BT, replace):
            return self._forward(ids_BT)

    def changed(self, place: Place, ids_BT: Tensor, replace: Replace) -> Any:
        """A context in which `replace` has the last word on the activations at the place."""
        shape = tuple(ids_BT.shape)
        factor = place.factor

        def change(tensor: Any) -> Any:
            flat = isinstance(tensor, Tensor) and tensor.ndim == 2  # OPT: tokens in one row
            if not isinstance(tensor, Tensor) or not flat and tuple(tensor.shape[:-1]) != shape:
                return tensor
            x_BTD = tensor.view(*shape, -1) if flat else tensor
            if factor != 1:
                return (replace(x_BTD * factor) / factor).view(tensor.shape)
            return replace(x_BTD).view(tensor.shape)

        def before(module: Any, args: Any, named: Any) -> Any:
            if args:
                return (change(args[0]), *args[1:]), named
            return args, named | {"hidden_states": change(named["hidden_states"])}

        def after(module: Any, args: Any, out: Any) -> Any:
            if isinstance(out, tuple | list):
                return type(out)((change(out[0]), *out[1:]))
            return change(out)

        module = self.model.get_submodule(place.module)
        if place.is_input:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def unembedding(self) -> Tensor | None:
        """[vocab, d], each row times the final norm's weight; None: it has no output embedding."""
        output = self.model.get_output_embeddings()
        if output is None:
            return None
        norm = _final_norm(self.model, output.weight.shape[1])
        if norm is None:
            return output.weight
        return output.weight * _scale_of(norm, output.weight).to(output.weight.device)

    @contextlib.contextmanager
    def repeated(self, ids_BT: Tensor) -> Iterator[Logits]:
        """`logits` of the same ids, as often as wanted: the blocks before the place, from which
        the same comes out every time, are run by the first call alone."""
        with contextlib.ExitStack() as skipped:
            kept: list[Any] = []

            def logits(replace: Replace | None = None) -> Tensor:
                if not self._before or kept:
                    return self.logits(ids_BT, replace)
                with self._before[-1].register_forward_hook(lambda *a: kept.append(_copy(a[-1]))):
                    found = self.logits(ids_BT, replace)
                for block in self._before:
                    skipped.enter_context(_stood_in_for(block, kept[0]))
                return found

            yield logits

    def check_repeated(self, ids_BT: Tensor) -> bool:
        """Whether `repeated` gives what the whole passes give, to the last bit, for this model;
        if not (a later block asks an early one for more than its output), it skips nothing."""
        if not self._before:
            return False
        wanted = [self.logits(ids_BT, replace) for replace in (None, torch.zeros_like, None)]
        try:
            with self.repeated(ids_BT) as logits:
                found = [logits(replace) for replace in (None, torch.zeros_like, None)]
        # Each family has code of its own, which raises whatever does not fit.
        except Exception:
            found = []
        if len(found) != 3 or not all(map(torch.equal, found, wanted)):
            self._before = []
        return bool(self._before)

    def _forward(self, ids_BT: Tensor) -> Tensor:
        logits: Tensor = self.model(ids_BT, use_cache=False).logits
        return logits

    @cached_property
    def keeps_its_past(self) -> bool:
        """Whether a text in two pieces gives the logits of the text, but for rounding: a family
        may keep no keys and values, or count positions from the piece's start. Not in bfloat16: its
        rounding differs between one token and many, and the likeliest token with it."""
        if self.model.dtype != torch.float32:
            return False
        ids_BT = torch.arange(3, 19, device=self.model.device)[None]
        whole = self._forward(ids_BT)[:, 8:].float()
        try:
            growing = Growing(self, keep=True)
            growing.logits(ids_BT[:, :8])
            parted = growing.logits(ids_BT[:, 8:]).float()
        # Each family has code of its own, which raises whatever does not fit.
        except Exception:
            return False
        return bool((parted - whole).abs().mean() <= ROUNDING * whole.std())


ROUNDING = 1e-3
"""Of the logits' standard deviation, on average."""


class Growing:
    """A text that grows at its end. Where the model keeps keys and values of what was (`keep`),
    only the new tokens are run; else all of them are, every time."""

    def __init__(self, network: Network, keep: bool) -> None:
        self._network, self._keep = network, keep
        self._ids: list[Tensor] = []
        self._past: Any = None

    def logits(self, more_BT: Tensor, replace: Growth | None = None) -> Tensor:
        """[B, T, vocab] of the tokens that are run, the last of `more_BT` at the end; `replace`
        is asked, with the number of the first of them, for what replaces their activations."""
        self._ids.append(more_BT)
        if not self._keep:
            whole = torch.cat(self._ids, 1)
            return self._network.logits(whole, None if replace is None else replace(0))
        first = sum(ids.shape[1] for ids in self._ids[:-1])
        place = self._network.places[0]
        with contextlib.ExitStack() as hooks:
            if replace is not None:
                assert place is not None
                hooks.enter_context(self._network.changed(place, more_BT, replace(first)))
            out = self._network.model(more_BT, use_cache=True, past_key_values=self._past)
        self._past = out.past_key_values
        if self._past is None:
            raise ValueError("the model keeps nothing of its past")
        logits: Tensor = out.logits
        return logits


def _blocks_before(model: nn.Module, place: Place) -> list[nn.Module]:
    """The blocks that a pass has left when it comes to the place; none where it has no list."""
    names = place.module.split(".")
    for depth, name in enumerate(names):
        blocks = model.get_submodule(".".join(names[:depth]))
        if isinstance(blocks, nn.ModuleList) and name.isdigit():
            is_whole = depth == len(names) - 1 and not place.is_input
            return list(blocks[: int(name) + is_whole])
    return []


def _copy(output: Any) -> Any:
    """A block's output, safe from later parts that add to it in place."""
    return tree_map_only(Tensor, torch.clone, output)


@contextlib.contextmanager
def _stood_in_for(block: nn.Module, output: Any) -> Iterator[None]:
    """The block computes nothing, and gives this output."""
    # Of a model over several devices the block has one of its own already, which moves its inputs.
    before = vars(block).get("forward")
    block.forward = lambda *args, **named: _copy(output)
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


def _final_norm(model: Any, d: int) -> nn.Module | None:
    """The norm behind the last block: the last one that is in no block."""
    found = None
    inside: tuple[str, ...] = ()
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList):
            inside += (f"{name}.",)
        elif not name.startswith(inside) and "norm" in type(module).__name__.lower():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.shape == (d,):
                found = module
    return found


def _scale_of(norm: nn.Module, like: Tensor) -> Tensor:
    """The weight that it works with, as it shows on a vector of mean 0 and variance 1: families
    keep it in more than one form (Gemma's is less 1)."""
    d = like.shape[1]
    signs = torch.ones(d, dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    where: Any = norm.weight
    signs = signs.to(where.device)
    plain: Tensor = norm(torch.zeros_like(signs)[None, None])[0, 0]
    scaled: Tensor = norm(signs[None, None])[0, 0]
    return ((scaled - plain) * signs).to(like.dtype)


@torch.inference_mode()
def bridge_outputs(bridge: Any, ids_BT: Tensor, hook_name: str) -> tuple[Tensor, Tensor]:
    """What TransformerLens' bridge has at the hook, and its logits."""
    seen: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        seen.append(activation.clone())  # Falcon adds attention's output to it in place

    logits = bridge.run_with_hooks(ids_BT, fwd_hooks=[(hook_name, keep)])
    return seen[0], logits
