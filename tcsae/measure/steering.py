"""Features set to values at every token, and how the language model goes on then.

What the SAE does not reconstruct stays as it was: only the features' own parts of the activation
change, so that a value that a feature has anyway changes nothing.

Shapes: B = 1, T tokens, D = d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.data.contexts import contexts_of
from tcsae.measure.text_features import TextReader, check_feature

MOST_TOKENS = 512


@dataclass(frozen=True)
class Steered:
    """Two continuations of one prompt."""

    prompt: str
    feature: int
    value: float
    """What the feature was set to, on the scale of its activations."""
    plain: str
    """The continuation without steering."""
    steered: str

    def __repr__(self) -> str:
        return "\n".join(
            (
                f"feature {self.feature} at {self.value:.4g}",
                f"as it is : {self.prompt}|{self.plain}",
                f"steered  : {self.prompt}|{self.steered}",
            )
        )


@torch.no_grad()
def steer(
    reader: TextReader,
    prompt: str,
    feature: int,
    value: float,
    *,
    tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> Steered:
    """Continue `prompt` as the model does, and with `feature` at `value` in the prompt too.

    Args:
        tokens: most tokens to add; it ends before at a token that ends a text.
        temperature: 0: the likeliest token each time; else drawn, with one `seed` for both.

    Raises:
        UserError: no such feature, an empty prompt, more tokens than the model has positions, a
            number out of range.
    """
    given = {feature: value}
    plain, steered = (
        continuation(reader, prompt, values, tokens=tokens, temperature=temperature, seed=seed)
        for values in ({}, given)
    )
    return Steered(prompt, feature, value, plain, steered)


@torch.no_grad()
def continuation(
    reader: TextReader,
    prompt: str,
    values: Mapping[int, float],
    *,
    tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """How `prompt` goes on with each feature of `values` at its value; {}: as the model does.

    Args and errors as of `steer`.
    """
    for feature, value in values.items():
        check_feature(feature, reader.sae.d_sae)
        if not -float("inf") < value < float("inf"):
            raise UserError(f"value {value:g}: a finite number")
    if not 1 <= tokens <= MOST_TOKENS:
        raise UserError(f"{tokens} tokens: 1 to {MOST_TOKENS} can be added")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature:g}: 0 or more")
    ids = reader.ids(prompt)
    positions = reader.model.positions
    if positions is not None and len(ids) + tokens > positions:
        raise UserError(
            f"the prompt has {len(ids)} tokens and {tokens} are to be added: the model has "
            f"{positions} positions"
        )
    replace = _with_features(reader, values) if values else None
    return _continued(reader, ids, tokens, temperature, seed, replace)


def _with_features(
    reader: TextReader, values: Mapping[int, float]
) -> Callable[..., Callable[[Tensor], Tensor]]:
    """For ids [1, T], and the place of the first one that is run (those before were, in an earlier
    call): what stands in for the hook's activations from there on, [1, T - first, D]."""
    sae = reader.sae
    features = torch.tensor(list(values), device=sae.device)
    wanted = torch.tensor(list(values.values()), dtype=torch.float32, device=sae.device)

    past: list[Tensor] = []  # what a sequential architecture looks at again

    def of(ids_BT: Tensor, first: int = 0) -> Callable[[Tensor], Tensor]:
        contexts = contexts_of(ids_BT.int(), reader.model.special_ids)

        def replace(x_BTD: Tensor) -> Tensor:
            x = x_BTD.float().to(sae.device)
            if sae.sequential:
                x = torch.cat([*(p[:, :first] for p in past), x], 1) if first else x
                past[:] = [x]
            at = slice(ids_BT.shape[1] - x.shape[1], None)
            # Special tokens and massive ones are no tokens that the SAE was trained on.
            counted = contexts.valid[:, at].to(x.device) & (x.norm(dim=-1) <= reader.norm_limit)
            codes = sae.encode(x, segments=contexts.segments[:, at].to(x.device), valid=counted)
            change = (wanted - codes[..., features]) @ sae.W_dec[features]
            new = torch.where(counted[..., None], x + change, x).to(x_BTD)
            return new[:, -x_BTD.shape[1] :]

        return replace

    return of


def _continued(
    reader: TextReader,
    prompt: list[int],
    tokens: int,
    temperature: float,
    seed: int,
    replace: Callable[..., Callable[[Tensor], Tensor]] | None,
) -> str:
    model, ids, more = reader.model, list(prompt), list(prompt)
    growing = model.growing()
    generator = torch.Generator().manual_seed(seed)
    ends = model.special_ids.boundaries
    for _ in range(tokens):
        set_ = None if replace is None else partial(replace, torch.tensor([ids]))
        logits = growing.logits(torch.tensor([more], device=model.device), set_)
        last = logits[0, -1].float().cpu()
        if temperature == 0:
            new = int(last.argmax())
        else:
            shares = (last / temperature).softmax(-1)
            new = int(torch.multinomial(shares, 1, generator=generator))
        if new in ends:
            break
        ids.append(new)
        more = [new]
    return str(model.tokenizer.decode(ids[len(prompt) :]))
