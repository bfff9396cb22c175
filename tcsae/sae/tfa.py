"""Temporal Feature Analysis: what the past predicts of a token, and sparse codes of what is new.

Lubana, Rager, Hindupur et al., "Priors in Time" (arXiv 2511.01836); the arithmetic is that of
SAELens' inference class "temporal" (sae_lens/saes/temporal_sae.py), which loads what is saved here.

Shapes: B contexts, T positions, N = B * T tokens, D = d_in, F = d_sae, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tcsae.config.sae import SAEConfig, TFAConfig
from tcsae.products import products_for
from tcsae.sae.codes import Codes, Places, SAELensState
from tcsae.sae.topk import TopKSAE
from tcsae.tensors.positions import as_contexts, document_starts, permute_within_segments, reordered


class _Parts(NamedTuple):
    """[B, T, ...] each."""

    novel_BTF: Tensor
    predictive_BTF: Tensor
    decoded_BTD: Tensor
    """Of both, without b_dec."""
    new_BTD: Tensor
    """What was not predicted, as the encoder sees it."""


class TFASAE(TopKSAE):
    """With c_t = x_t - b_dec and z_t = ReLU(c_t W_enc) (W_enc with `gain`):

        p     = ReLU(attention of z_t over the z of earlier tokens)
        z_p   = p (p W_dec . c) / |p W_dec|^2
        z_n   = the k largest of ReLU((c - z_p W_dec) W_enc)
        x_hat = (z_p + z_n) W_dec + b_dec

    A token attends to the valid tokens before it in its document, and to nothing at all (a key of
    zeros), as a document's first token must. z_p may be negative and is dense; z_n are the features
    unless `codes` says otherwise, and `decode` gives their part alone. No encoder bias. The loss is
    the squared error of x_hat. The attention works on codes, d_sae wide: with its two products of
    [d_sae, d_sae] it costs several times what the rest does.
    """

    is_recordable: ClassVar[bool] = False
    config_class: ClassVar[type[SAEConfig]] = TFAConfig
    sequential: ClassVar[bool] = True
    preactivation_units: ClassVar[tuple[str, ...]] = ()
    cfg: TFAConfig

    def __init__(self, cfg: TFAConfig, d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator)
        layer = _Attention(cfg.d_sae, cfg.n_heads, cfg.bottleneck_factor, generator)
        self.attn_layers = nn.ModuleList([layer])

    def add_encoder_vectors(self) -> None:
        """None."""

    @property
    def gain(self) -> float:
        """What the encoder's input is multiplied by, .71 to 1.41.

        SAELens divides it by 4 d_in; the rest of that is a power of two in its W_enc, so that no
        bit is lost between the two.
        """
        return 2.0**self._exponent / (4 * self.d_in)

    @property
    def _exponent(self) -> int:
        return round(math.log2(4 * self.d_in))

    @property
    def b_enc(self) -> Tensor:  # type: ignore[override]
        """Zeros [d_sae]; there is no tensor of this name."""
        return self.W_enc.new_zeros(self.d_sae)

    def encode(
        self, x: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """Contexts [B, T, d_in], or one context [T, d_in], or one token [d_in] -> codes."""
        return self.encode_and_decode(x, segments=segments, valid=valid)[0]

    def encode_and_decode(
        self, x: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(codes, reconstructions from both kinds of codes)."""
        contexts_BTD, segments_BT, valid_BT = as_contexts(x, segments, valid)
        centred_BTD = torch.where(valid_BT[..., None], contexts_BTD - self.b_dec, 0)
        parts = self._parts(centred_BTD, segments_BT, valid_BT)
        features = parts.novel_BTF if self.cfg.codes == "novel" else parts.predictive_BTF
        x_hat_BTD = parts.decoded_BTD + self.b_dec
        return features.reshape(*x.shape[:-1], self.d_sae), x_hat_BTD.reshape(x.shape)

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        valid_BT, segments_BT = places.valid_BT, places.segments_BT
        # b_dec's way into the codes; its value is in centred_ND already.
        shift_ND = (self.b_dec.detach() - self.b_dec) * places.valid_N1
        centred_BTD = (centred_ND + shift_ND).view(*valid_BT.shape, self.d_in)
        if not self.cfg.shuffle_positions:
            parts = self._parts(centred_BTD, segments_BT, valid_BT)
        else:
            generator = places.generator or torch.default_generator
            order_BT = permute_within_segments(segments_BT, valid_BT, generator)
            moved = self._parts(reordered(centred_BTD, order_BT), segments_BT, valid_BT)
            back_BT = order_BT.argsort(dim=1)
            parts = _Parts(*(reordered(part, back_BT) for part in moved))
        features = parts.novel_BTF if self.cfg.codes == "novel" else parts.predictive_BTF
        new_ND = parts.new_BTD.detach().flatten(0, 1)
        return Codes(features.flatten(0, 1), parts.decoded_BTD.flatten(0, 1), input_ND=new_ND)

    def _parts(self, centred_BTD: Tensor, segments_BT: Tensor, valid_BT: Tensor) -> _Parts:
        """`centred_BTD` = x - b_dec, zero at tokens that are not valid."""
        valid_BT1 = valid_BT[..., None]
        z_BTF = (centred_BTD * self.gain @ self.W_enc).relu()
        allowed_BTT = _past(segments_BT, valid_BT)
        attention: Any = self.attn_layers[0]
        raw_BTF = attention(_shifted(z_BTF, segments_BT), z_BTF, allowed_BTT).relu() * valid_BT1
        direction_BTD = (raw_BTF @ self.W_dec).float()
        # SAELens adds 1e-6 to the norm, which no folded scale could undo.
        square_BT1 = direction_BTD.square().sum(-1, keepdim=True)
        along_BT1 = (direction_BTD * centred_BTD).sum(-1, keepdim=True)
        some_BT1 = square_BT1 > 0
        scale_BT1 = torch.where(some_BT1, along_BT1 / torch.where(some_BT1, square_BT1, 1), 0)
        predicted_BTD = direction_BTD * scale_BT1
        new_BTD = (centred_BTD - predicted_BTD) * self.gain
        novel_BTF = self.activation(new_BTD @ self.W_enc) * valid_BT1
        decoded_BTD = predicted_BTD + (novel_BTF @ self.W_dec).float()
        return _Parts(novel_BTF, raw_BTF * scale_BT1, decoded_BTD, new_BTD)

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """As in the base class; the attention keeps its weights at codes `scale` times smaller."""
        super().fold_input_scale(scale)
        attention: Any = self.attn_layers[0]
        attention.k_ctx.weight.mul_(scale)
        attention.q_target.weight.mul_(scale)
        attention.v_ctx.bias.div_(scale)
        attention.c_proj.bias.div_(scale)

    def saelens_state(self) -> SAELensState:
        state = super().saelens_state()
        tensors = {
            **state.tensors,
            "W_enc": self.W_enc.detach() * 2.0**self._exponent,
            "attn_layers.0.k_ctx.bias": self.W_enc.new_zeros(
                self.d_sae // self.cfg.bottleneck_factor
            ),
        }
        cfg = {
            "n_heads": self.cfg.n_heads,
            "n_attn_layers": 1,
            "bottleneck_factor": self.cfg.bottleneck_factor,
            "sae_diff_type": "topk",
            "kval_topk": self.cfg.k,
            "tied_weights": False,
            "activation_normalization_factor": 1.0,
        }
        return SAELensState("temporal", cfg, tensors)

    @classmethod
    def saelens_fields(cls, cfg: Mapping[str, Any]) -> dict[str, Any]:
        computed = {
            "tied_weights": False,
            "n_attn_layers": 1,
            "sae_diff_type": "topk",
            "apply_b_dec_to_input": True,
        }
        for key, value in computed.items():
            if cfg[key] != value:
                raise ValueError(f"{key}={cfg[key]!r} is not computed here, only {value!r}")
        names = ("d_sae", "n_heads", "bottleneck_factor")
        return {**{name: cfg[name] for name in names}, "k": cfg["kval_topk"]}

    def load_saelens(self, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        W_enc = tensors["W_enc"].float() / 2.0**self._exponent
        super().load_saelens(cfg, {**tensors, "W_enc": W_enc})


class _Attention(nn.Module):
    """Attention of codes to earlier codes; the names are those of SAELens' tensors."""

    def __init__(
        self, d_sae: int, n_heads: int, bottleneck: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        d_key = d_sae // bottleneck
        # A bias would add the same to all of a query's scores: SAELens' has no effect.
        self.k_ctx = _linear(d_sae, d_key, 1 / math.sqrt(d_key / n_heads), generator, bias=False)
        self.q_target = _linear(d_sae, d_key, 1 / math.sqrt(d_key / n_heads), generator)
        self.v_ctx = _linear(d_sae, d_sae, 1 / math.sqrt(d_sae / n_heads), generator)
        self.c_proj = _linear(d_sae, d_sae, 1 / math.sqrt(d_sae), generator)

    def forward(self, past_BTF: Tensor, z_BTF: Tensor, allowed_BTT: Tensor) -> Tensor:
        def heads(x_BTX: Tensor) -> Tensor:
            return x_BTX.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

        found = products_for(z_BTF.device).attention(
            heads(self.q_target(z_BTF)),
            heads(self.k_ctx(past_BTF)),
            heads(self.v_ctx(past_BTF)),
            allowed_BTT[:, None],
        )
        return self.c_proj(found.transpose(1, 2).flatten(2))


def _linear(
    d_from: int,
    d_to: int,
    row_norm: float,
    generator: torch.Generator | None,
    bias: bool = True,
) -> nn.Linear:
    """Random rows of one norm, bias 0."""
    linear = nn.utils.skip_init(nn.Linear, d_from, d_to, bias=bias)
    with torch.no_grad():
        rows = torch.randn(d_to, d_from, generator=generator)
        linear.weight.copy_(normalize(rows, dim=1) * row_norm)
        if bias:
            linear.bias.zero_()
    return linear


def _shifted(z_BTF: Tensor, segments_BT: Tensor) -> Tensor:
    """Key t holds the code of token t - 1; zeros at the first token of a document."""
    return z_BTF.roll(1, 1) * (~document_starts(segments_BT))[..., None]


def _past(segments_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """[B, T, T] bool: whether a token may attend to a key of `_shifted`."""
    n_positions = segments_BT.shape[1]
    counts_BT = document_starts(segments_BT) | valid_BT.roll(1, 1)
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    earlier_TT = torch.ones(
        n_positions, n_positions, dtype=torch.bool, device=valid_BT.device
    ).tril()
    return same_BTT & counts_BT[:, None, :] & earlier_TT
