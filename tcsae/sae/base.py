"""What all sparse autoencoders share: parameters, losses, dead features, scale, export.

Shape suffixes: B contexts, T positions, N = B * T tokens, D = d_in, F = d_sae, J dead features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tcsae.config.sae import SAEConfig
from tcsae.products import products_for
from tcsae.sae.codes import Codes, Moment, Places, SAELensState, TrainingOutput
from tcsae.sae.statistics import geometric_median, total_variance


class SparseAutoencoder(nn.Module, ABC):
    """f = act((x - b_dec) @ W_enc + b_enc), x_hat = f @ W_dec + b_dec.

    Parameters, float32: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in].
    W_dec starts as random rows of norm 1, W_enc as `encoder_scale` times its transpose (tied start:
    Gao et al. 2024, arXiv 2406.04093, appendix A.1; Conerly et al. 2024, Anthropic's April update),
    biases as 0.
    The same generator state gives the same weights. `generator` lives on the CPU. W_enc lies in
    memory by feature, as W_dec does: its gradient comes so, and the product takes either.
    """

    config_class: ClassVar[type[SAEConfig]]
    preactivation_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers that scale with the input: biases and thresholds."""
    sequential: ClassVar[bool] = False
    """Whether the code of a token depends on the tokens before it."""
    is_recordable: ClassVar[bool] = False
    """Whether a step draws nothing and decides nothing on the host (training/graphed.py)."""
    resampled_encoder_norm: ClassVar[float] = 0.2
    """Norm of a resampled encoder column, as a share of the live columns' mean norm."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, cfg: SAEConfig, d_in: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.d_in = d_in
        self.d_sae = cfg.d_sae
        rows = normalize(torch.randn(cfg.d_sae, d_in, generator=generator), dim=1)
        self.W_enc = nn.Parameter(rows.T * cfg.encoder_scale)
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.add_encoder_vectors()

    # ---- what an architecture may change ----

    @abstractmethod
    def activation(self, pre: Tensor) -> Tensor:
        """Pre-activations [..., d_sae] -> features of the same shape, each token on its own.

        Zeros give zeros, and activation(c * pre) = c * activation(pre) for c > 0 once the
        parameters in `preactivation_units` are multiplied by c.
        """

    def add_encoder_vectors(self) -> None:
        """Create the encoder's parameters beside W_enc."""
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    def pre_activations(self, centred: Tensor) -> Tensor:
        """x - b_dec [..., d_in] -> [..., d_sae]."""
        return centred @ self.W_enc + self.b_enc

    def training_codes(self, centred_ND: Tensor, places: Places) -> Codes:
        """The codes of a training batch, whose tokens may depend on one another.

        `centred_ND` = x - b_dec without gradient, zero at tokens that are not valid; the
        encoder's gradient reaches b_dec through `b_dec_gradient_path`.
        """
        pre_NF = self.training_pre_activations(centred_ND, places)
        features_NF = self.activation(pre_NF)
        return Codes(features_NF, features_NF @ self.W_dec, pre_NF)

    def training_pre_activations(self, centred_ND: Tensor, places: Places) -> Tensor:
        """[N, d_sae], zero at tokens that are not valid; arguments as of `training_codes`."""
        bias_F = self.b_enc + self.b_dec_gradient_path()
        # Zero pre-activations are zero features, so no later step has to know the mask.
        return torch.addmm(bias_F, centred_ND, self.W_enc).mul_(places.valid_N1)

    def architecture_losses(
        self, codes: Codes, x_ND: Tensor, places: Places, now: Moment
    ) -> dict[str, Tensor]:
        """Loss terms beside the reconstruction, weighted; called with autocast off.

        `x_ND` equals b_dec at tokens that are not valid, so that x_hat - x is zero there."""
        return {}

    def constrain(self) -> None:
        """What holds after every optimizer step: decoder rows of norm 1."""
        self.normalise_decoder()

    def after_step(self, codes: Codes, *, progress: float) -> None:
        """Once after every optimizer step: take its batch into what is no parameter.

        Here and nowhere else: the passes and losses change nothing, and called again say the same.
        `codes` are those of the step, `progress` as of `training_forward`.
        """

    def reset_encoder_vectors(self, dead_J: Tensor) -> None:
        """Give the encoder vectors of the features with indices `dead_J` their first values."""
        self.b_enc[dead_J] = 0.0

    def saelens_state(self) -> SAELensState:
        """What SAELens reads: its architecture name, its cfg keys, its tensors."""
        tensors = {name: value.detach() for name, value in self.named_parameters()}
        return SAELensState(self.cfg.architecture, {}, tensors)

    @classmethod
    def saelens_fields(cls, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration fields that the top level of a SAELens cfg.json fixes."""
        return {"d_sae": cfg["d_sae"]}

    def load_saelens(self, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors that `saelens_state` named; dtypes are converted to float32."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(tensors[name])

    # ---- use ----

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def encode(
        self, x: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """Inputs [..., d_in] -> features [..., d_sae].

        An architecture that looks at a token's past (`sequential`) takes whole contexts, x
        [B, T, d_in], with the document of every position and whether it counts, [B, T] (None: one
        document, all count). To the others tokens are independent and both are nothing.
        """
        return self.activation(self.pre_activations(x - self.b_dec))

    def decode(self, features: Tensor) -> Tensor:
        """Features [..., d_sae] -> reconstructions [..., d_in]."""
        return features @ self.W_dec + self.b_dec

    def encode_and_decode(
        self, x: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(features, reconstructions); arguments as of `encode`."""
        features = self.encode(x, segments=segments, valid=valid)
        return features, self.decode(features)

    def forward(
        self, x: Tensor, *, segments: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """Inputs [..., d_in] -> reconstructions of the same shape; arguments as of `encode`."""
        return self.encode_and_decode(x, segments=segments, valid=valid)[1]

    # ---- training ----

    def training_forward(
        self,
        x_BTD: Tensor,
        valid_BT: Tensor,
        *,
        sparsity_warmup: float | Tensor,
        dead_F: Tensor | None,
        progress: float = 0.0,
        segments_BT: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TrainingOutput:
        """Features, reconstruction and loss terms of a batch; x is data and gets no gradient.

        reconstruction = mean over valid tokens of sum over d_in of (x_hat - x)^2; the other
        terms: the architecture's own and "auxk". Tokens that are not valid contribute neither
        value nor gradient, whatever they hold. `sparsity_warmup` multiplies the
        sparsity term; `dead_F` marks dead features, [d_sae] bool, or has their indices [J]
        (None: there can be none yet);
        `progress` in [0, 1] is the share of the run that is done; `segments_BT` [B, T] numbers
        the documents of each context (None: one), `generator` (on the CPU) is for what an
        architecture draws. Under torch.autocast the products run in its dtype, sums and losses in
        float32, gradients arrive in float32.
        """
        places = Places.of(valid_BT, segments_BT, generator)
        b_dec = self.b_dec.detach()
        x_ND = torch.where(places.valid_N1, x_BTD.detach().reshape(-1, self.d_in).float(), b_dec)
        centred_ND = x_ND - b_dec
        codes = self.training_codes(centred_ND, places)
        with torch.autocast(x_BTD.device.type, enabled=False):
            decoded_ND = codes.decoded_ND.float()
            products = products_for(decoded_ND.device)
            squared, error_ND = products.squared_error(decoded_ND, self.b_dec, x_ND)
            losses = {"reconstruction": squared / places.n_valid}
            now = Moment(sparsity_warmup, progress)
            losses |= self.architecture_losses(codes, x_ND, places, now)
        if self.cfg.revival == "auxk":
            seen_ND = centred_ND if codes.input_ND is None else codes.input_ND
            losses["auxk"] = self.auxk_loss(seen_ND, error_ND.detach(), places, dead_F)
        return TrainingOutput(codes, x_BTD.shape, b_dec.clone(), losses)

    def b_dec_gradient_path(self) -> Tensor:
        """[d_sae] zeros through which the gradient of a pre-activation bias reaches b_dec.

        The gradient of (x - b_dec) @ W_enc to b_dec needs only the column sums of the
        pre-activations' gradient; taken this way it costs one matrix-vector product in place
        of a fifth full product (OpenAI's code does the same in its encoder's backward pass).
        """
        with torch.autocast(self.device.type, enabled=False):
            return (self.b_dec.detach() - self.b_dec) @ self.W_enc.detach()

    def auxk_loss(
        self,
        centred_ND: Tensor,
        error_ND: Tensor,
        places: Places,
        dead_F: Tensor | None,
    ) -> Tensor:
        """AuxK (Gao et al. 2024, arXiv 2406.04093, appendix A.2): dead features rebuild x - x_hat.

        coefficient * var(x) * mean |e_hat - e|^2 / var(e), e = x - x_hat, e_hat from the top
        k_aux dead pre-activations. OpenAI's code divides this term by var(e) and the
        reconstruction by var(x); ours keeps the reconstruction as it is, hence the factor var(x).
        The pre-activations pass a ReLU, as in OpenAI's code; those of a feature that has none
        above zero in the batch go in as they are, or it would get no gradient.
        """
        if dead_F is None:
            return error_ND.new_zeros(())
        among_J, dead_J = dead_F, None
        if dead_F.dtype == torch.bool:
            among_J, dead_J = products_for(dead_F.device).dead(dead_F)
        if not len(among_J):
            return error_ND.new_zeros(())
        residual_ND = -error_ND
        rebuilt_ND = self._rebuilt(centred_ND, places, among_J, dead_J)
        with torch.autocast(residual_ND.device.type, enabled=False):
            error = (rebuilt_ND.float() - residual_ND).square().sum() / places.n_valid
            var_x = total_variance(centred_ND, places.n_valid)
            # A residual of no variance (one token, a perfect fit) must not divide by zero.
            floor = 1e-6 * var_x + torch.finfo(torch.float32).tiny
            weight = var_x / total_variance(residual_ND, places.n_valid).maximum(floor)
            loss = self.cfg.auxk_coefficient * weight * error
            # Among those that were looked at, none may be dead.
            return loss if dead_J is None else torch.where(dead_J.any(), loss, 0)

    def _rebuilt(
        self, centred_ND: Tensor, places: Places, among_J: Tensor, dead_J: Tensor | None
    ) -> Tensor:
        """The top k_aux pre-activations of the features with indices `among_J`, decoded, [N, D].

        Those that `dead_J` [J] bool does not mark are left out; None: all are dead. The two ways to
        say which ones are dead agree in value and gradients.
        """
        pre_NJ = self.dead_pre_activations(centred_ND, among_J) * places.valid_N1
        silent_J = pre_NJ.amax(0) <= 0
        pre_NJ = torch.where(silent_J, pre_NJ, pre_NJ.relu())
        if dead_J is not None:
            pre_NJ = torch.where(dead_J, pre_NJ, -torch.inf)
        k_aux = min(self.cfg.k_aux or max(self.d_in // 2, 1), among_J.numel())
        if k_aux < among_J.numel() or dead_J is not None:
            values, index = pre_NJ.topk(k_aux, dim=-1, sorted=False)
            if dead_J is not None:
                values = torch.where(values > -torch.inf, values, 0)
            pre_NJ = torch.zeros_like(pre_NJ).scatter(-1, index, values)
        return pre_NJ @ self.W_dec[among_J]

    def dead_pre_activations(self, centred_ND: Tensor, dead_J: Tensor) -> Tensor:
        """Pre-activations [N, J] of the features with indices `dead_J`, for AuxK."""
        return torch.addmm(self.b_enc[dead_J], centred_ND, self.W_enc[:, dead_J])

    @torch.no_grad()
    def set_b_dec(self, center: Tensor) -> None:
        """b_dec = `center` [d_in]."""
        self.b_dec.copy_(center)

    def initialise_from_data(self, x_ND: Tensor) -> None:
        """b_dec = the geometric median of the tokens [N, d_in] (Bricken et al. 2023)."""
        self.set_b_dec(geometric_median(x_ND))

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from W_dec.grad the part along each row. Call it after backward.

        Along a row only its norm would change, and `normalise_decoder` undoes that; left in, it
        would enter Adam's moments (Bricken et al. 2023, appendix "Optimizer").
        """
        grad = self.W_dec.grad
        if grad is None:
            raise RuntimeError("project_decoder_gradient() comes after backward(): no gradient")
        along_F1 = (grad * self.W_dec).sum(1, keepdim=True)
        grad.addcmul_(self.W_dec, along_F1 / self.W_dec.square().sum(1, keepdim=True), value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every decoder row norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_(min=1e-12))

    @torch.no_grad()
    def revive(
        self,
        dead_F: Tensor,
        optimizer: torch.optim.Optimizer,
        x_ND: Tensor,
        generator: torch.Generator | None = None,
    ) -> int:
        """Resample dead features from badly reconstructed tokens; returns how many.

        Bricken et al. 2023 (Towards Monosemanticity, "Neuron resampling"): token n of `x_ND`
        [N, d_in] is drawn with probability ~ (squared error)^2; a dead feature's decoder row
        becomes its direction from b_dec, the encoder column the same at
        `resampled_encoder_norm` times the live columns' mean norm, the bias 0, and the
        optimizer's moments of these slices 0. `generator` lives on the CPU.
        """
        dead_J = dead_F.nonzero().squeeze(1)
        n_dead = dead_J.numel()
        if n_dead == 0:
            return 0
        squared_error = (x_ND - self(x_ND)).square().sum(-1)
        chance = squared_error.double().square().clamp_min(1e-30).cpu()
        drawn = torch.multinomial(chance, n_dead, n_dead > len(chance), generator=generator)
        direction_JD = normalize(x_ND[drawn.to(x_ND.device)].float() - self.b_dec, dim=1)
        norms_F = self.W_enc.norm(dim=0)
        live_norm = norms_F[~dead_F].mean() if n_dead < self.d_sae else norms_F.mean()
        self.W_dec[dead_J] = direction_JD
        self.W_enc[:, dead_J] = direction_JD.T * (self.resampled_encoder_norm * live_norm)
        self.reset_encoder_vectors(dead_J)
        for name, parameter in self.named_parameters():
            if name == "b_dec":
                continue
            for moment in optimizer.state.get(parameter, {}).values():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    moment.index_fill_(1 if name == "W_enc" else 0, dead_J, 0.0)
        return n_dead

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Trained on x * scale, work on raw x from now on: raw in, raw out, the same firing.

        b_enc, thresholds and b_dec are divided by `scale`; W_enc and W_dec stay. For an
        activation that commutes with a positive factor this gives f_raw = f / scale and
        x_hat_raw = x_hat / scale exactly, and the decoder rows keep norm 1. It equals the
        form W_enc *= s, W_dec /= s, b_dec /= s with the decoder's norm 1 / s then moved into
        W_enc and b_enc. Features come out in the units of raw activations. ValueError unless
        0 < scale < inf.
        """
        if not 0 < scale < math.inf:
            raise ValueError(f"input scale is {scale}: it must be a finite number above 0")
        for name in (*self.preactivation_units, "b_dec"):
            getattr(self, name).div_(scale)
