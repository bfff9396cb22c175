"""This package's architectures as classes of SAELens 6, for people who work there.

`register()` makes, once in a process,

* every architecture whose export SAELens has no class for loadable with SAE.load_from_disk;
* "tcsae_topk", "tcsae_standard" ... trainable by SAELens' SAETrainer and its runners: the same
  forward pass, losses and revival of dead features as `python -m tcsae.train`.

SAELens trains on tokens in random order. There a token has no neighbours: the temporal loss does
not exist, and architectures that look at other tokens are not offered for training.

sae_lens is imported when `register` is called, not before.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.config.sae import architectures, config_class
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import SAELensState
from tcsae.sae.formats.saelens import empty_sae, save_saelens
from tcsae.sae.registry import sae_class

PREFIX = "tcsae_"
"""Of the names under which our classes train in SAELens."""
_PROBE = {"d_in": 64, "d_sae": 256}


def register() -> None:
    """Register our classes with SAELens; a second call does nothing. UserError without sae-lens."""
    try:
        from sae_lens import register_sae_class, register_sae_training_class
        from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
    except ImportError as error:
        raise UserError(
            f"sae-lens cannot be imported ({error}): pip install 'sae-lens>=6.54,<7'"
        ) from None
    for name in architectures():
        state = exported(name)
        if state.architecture not in SAE_CLASS_REGISTRY:
            register_sae_class(state.architecture, *_inference_classes(state))
        if is_trainable(name) and PREFIX + name not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(PREFIX + name, *_training_classes(name, state.architecture))


def exported(name: str) -> SAELensState:
    """How architecture `name` is written for SAELens, by the word of a small SAE of it."""
    config = config_class(name)(architecture=name, d_sae=_PROBE["d_sae"])
    return sae_class(name)(config, _PROBE["d_in"], torch.Generator()).saelens_state()


def is_trainable(name: str) -> bool:
    """Whether the architecture trains on tokens that have no neighbours."""
    return not sae_class(name).sequential and "pairs" not in config_class(name).model_fields


# --------------------------------------------------------------------------------- what is shared


def _ours_inside(base: type) -> type:
    """`base`, an SAE class of SAELens, with one of our SAEs, `ours`, that holds the parameters."""

    class OursInside(base):  # type: ignore[misc]
        ours: SparseAutoencoder

        # SAELens reads and scales these where they are.
        W_enc = property(lambda self: self.ours.W_enc)
        W_dec = property(lambda self: self.ours.W_dec)
        b_dec = property(lambda self: self.ours.b_dec)

        def _codes(self, x: Tensor) -> Tensor:
            x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
            return self.hook_sae_acts_post(self.ours.encode(x))

        def decode(self, feature_acts: Tensor) -> Tensor:
            x_hat = self.hook_sae_recons(self.ours.decode(feature_acts))
            return self.reshape_fn_out(x_hat, self.d_head)

    return OursInside


# ------------------------------------------------------------------------------------- inference


def _inference_classes(state: SAELensState) -> tuple[type, type]:
    """(SAE class, its config class) of an architecture that SAELens does not know."""
    from sae_lens import SAE, SAEConfig

    config: Any = dataclasses.make_dataclass(
        f"{state.architecture}_SAEConfig",
        [(key, type(value), dataclasses.field(default=value)) for key, value in state.cfg.items()],
        bases=(SAEConfig,),
        namespace={"architecture": classmethod(lambda cls: state.architecture)},
    )

    class LoadedSAE(_ours_inside(SAE)):  # type: ignore[misc]
        def initialize_weights(self) -> None:
            self.ours = empty_sae(self.cfg.to_dict())

        def encode(self, x: Tensor) -> Tensor:
            return self._codes(x)

        def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
            self.ours.load_saelens(self.cfg.to_dict(), state_dict)
            state_dict.clear()
            state_dict.update(self.state_dict())

        def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
            state_dict.clear()
            tensors = self.ours.saelens_state().tensors
            state_dict.update({name: value.contiguous() for name, value in tensors.items()})

    LoadedSAE.__name__ = LoadedSAE.__qualname__ = f"{state.architecture}_SAE"
    return LoadedSAE, config


# -------------------------------------------------------------------------------------- training


def _training_classes(name: str, exported_as: str) -> tuple[type, type]:
    """(training class, its config class) of our architecture `name`."""
    from sae_lens import TrainingSAE
    from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput

    class OurTrainingSAE(_ours_inside(TrainingSAE)):  # type: ignore[misc]
        """Trains an SAE of this package; inputs of norm sqrt(d_in) are what its losses expect."""

        def initialize_weights(self) -> None:
            own = {field: getattr(self.cfg, field) for field in _own_fields(name)}
            own |= {"architecture": name, "d_sae": self.cfg.d_sae}
            # By way of JSON, as a checkpoint's cfg.json comes: it has lists for tuples.
            config = config_class(name).model_validate_json(json.dumps(own))
            ours = sae_class(name)(config, self.cfg.d_in)
            self.ours = ours.to(self.cfg.device, self.dtype)
            self._projecting: tuple[Tensor, ...] = ()

        def get_coefficients(self) -> dict[str, Any]:
            return {"sparsity": TrainCoefficientConfig(1.0, self.cfg.sparsity_warm_up_steps)}

        def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """Our classes keep no pre-activations: the features stand in for them."""
            features = self._codes(x)
            return features, features

        def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            """All losses are in `training_forward_pass`."""
            return {}

        def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
            """Every token as a context of its own: in SAELens' batches none has a neighbour."""
            x_ND, step = step_input.sae_in, step_input.n_training_steps
            if step == 0:
                self.ours.initialise_from_data(x_ND)
            # SAELens' trainer gives no word after its optimizer's step.
            self.ours.constrain()
            self._project_gradient()
            dead_F = step_input.dead_neuron_mask
            if dead_F is None:
                dead_F = torch.zeros(self.ours.d_sae, dtype=torch.bool, device=x_ND.device)
            steps = self.cfg.training_steps
            progress = min(step / steps, 1.0) if steps else 0.0
            output = self.ours.training_forward(
                x_ND[:, None],
                torch.ones(len(x_ND), 1, dtype=torch.bool, device=x_ND.device),
                sparsity_warmup=step_input.coefficients["sparsity"],
                dead_F=dead_F,
                progress=progress,
            )
            # Nor is there a later place for this: SAELens' trainer keeps what it is returned.
            self.ours.after_step(output.codes, progress=progress)
            features_NF = output.features[:, 0]
            # Under their names in SAELens' logs.
            losses = {"mse_loss": output.losses["reconstruction"], **output.losses}
            del losses["reconstruction"]
            return TrainStepOutput(
                sae_in=x_ND,
                sae_out=output.reconstruction[:, 0],
                feature_acts=features_NF,
                hidden_pre=features_NF,
                loss=torch.stack(list(losses.values())).sum(),
                losses=losses,
            )

        def _project_gradient(self) -> None:
            """From now on W_dec's gradient loses its part along the rows as it arrives."""
            if not any(known is self.W_dec for known in self._projecting):
                self.W_dec.register_post_accumulate_grad_hook(
                    lambda _: self.ours.project_decoder_gradient()
                )
                # In a tuple, or torch would save it as a parameter of its own.
                self._projecting = (self.W_dec,)

        def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
            self.ours.constrain()
            self.ours.fold_input_scale(scaling_factor)
            self.cfg.normalize_activations = "none"

        def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
            state_dict.update({name: value.contiguous() for name, value in state_dict.items()})

        def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
            self.ours.constrain()
            save_saelens(path, self.ours, self.cfg.metadata.to_dict())
            return Path(path) / "sae_weights.safetensors", Path(path) / "cfg.json"

    OurTrainingSAE.__name__ = OurTrainingSAE.__qualname__ = f"{PREFIX}{name}_TrainingSAE"
    return OurTrainingSAE, _training_config(name, exported_as)


def _own_fields(name: str) -> dict[str, Any]:
    """The architecture's own options with their defaults; SAELens has the others itself."""
    others = ("architecture", "d_sae", "dead_after_tokens")
    fields = config_class(name).model_fields
    own = {
        key: field.get_default(call_default_factory=True)
        for key, field in fields.items()
        if key not in others
    }
    if own["revival"] == "resample":
        own["revival"] = "auxk"
    return own


def _training_config(name: str, exported_as: str) -> type:
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import TrainingSAEConfig

    def check(self: Any) -> None:
        if self.normalize_activations not in ("none", "expected_average_only_in"):
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r}: {PREFIX}{name} takes "
                "'expected_average_only_in' or 'none'"
            )
        if not self.apply_b_dec_to_input:
            raise ValueError(f"apply_b_dec_to_input must be True for {PREFIX}{name}")
        if self.revival == "resample":
            raise ValueError(
                "revival='resample' needs the optimizer, which SAELens' trainer keeps to itself: "
                "take 'auxk' or 'none'"
            )
        TrainingSAEConfig.__post_init__(self)

    added = {
        "normalize_activations": "expected_average_only_in",
        "decoder_init_norm": None,
        "sparsity_warm_up_steps": 0,
        "training_steps": 0,
        **_own_fields(name),
    }
    return dataclasses.make_dataclass(
        f"{PREFIX}{name}_TrainingSAEConfig",
        [(key, Any, dataclasses.field(default=value)) for key, value in added.items()],
        bases=(TrainingSAEConfig,),
        kw_only=True,
        namespace={
            "architecture": classmethod(lambda cls: PREFIX + name),
            "get_inference_config_class": lambda self: get_sae_class(exported_as)[1],
            "__post_init__": check,
        },
    )
