"""Our classes inside SAELens: its loader, its trainer, and what is said where it is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from saes import D_IN, D_SAE, disturb, explained_variance, sparse_data
from torch import Tensor

import tcsae
from tcsae.config import sae as sae_configs
from tcsae.config.sae import SAEConfig, StandardConfig
from tcsae.sae import registry
from tcsae.sae.codes import SAELensState
from tcsae.sae.formats.saelens import save_saelens
from tcsae.sae.formats.saelens_registry import PREFIX, exported, is_trainable
from tcsae.sae.standard import StandardSAE

OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka": {"k": 4},
    "standard": {"l1_coefficient": 0.02},
}
TRAINABLE = [name for name in sae_configs.architectures() if is_trainable(name)]
BATCH, STEPS = 256, 150


class StrangerConfig(StandardConfig):
    architecture: Literal["stranger"] = "stranger"  # type: ignore[assignment]
    floor: float = 0.0


class StrangerSAE(StandardSAE):
    """An architecture that SAELens has no class for: ReLU above a stored floor, and a gain."""

    config_class: ClassVar[type[SAEConfig]] = StrangerConfig

    def add_encoder_vectors(self) -> None:
        super().add_encoder_vectors()
        self.gain = torch.nn.Parameter(torch.ones(self.d_sae))

    def activation(self, pre: Tensor) -> Tensor:
        return torch.where(pre > self.cfg.floor, pre, 0.0) * self.gain

    def saelens_state(self) -> SAELensState:
        return super().saelens_state()._replace(cfg={"floor": self.cfg.floor})

    @classmethod
    def saelens_fields(cls, cfg: Any) -> dict[str, Any]:
        return {"d_sae": cfg["d_sae"], "floor": cfg["floor"]}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """SAELens with our classes, and with one more that only this module has."""
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    before = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)
    sae_configs._CONFIGS["stranger"] = StrangerConfig
    registry._CLASSES[StrangerConfig] = StrangerSAE
    tcsae.register_with_saelens()
    yield
    del registry._CLASSES[StrangerConfig], sae_configs._CONFIGS["stranger"]
    for known, old in zip((SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY), before, strict=True):
        for name in known.keys() - old.keys():
            del known[name]


def batches() -> Iterator[Tensor]:
    step = 0
    while True:
        yield sparse_data(BATCH, step, active=2 / 16)
        step += 1


def training_sae(name: str, **options: Any) -> Any:
    from sae_lens.registry import get_sae_training_class

    kind, config = get_sae_training_class(PREFIX + name)
    torch.manual_seed(0)
    given = {"training_steps": STEPS, **OPTIONS.get(name, {}), **options}
    return kind(config(d_in=D_IN, d_sae=D_SAE, **given))


def trainer_of(sae: Any, **options: Any) -> Any:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    given = {
        "total_training_samples": BATCH * STEPS,
        "train_batch_size_samples": BATCH,
        "lr": 1e-2,
        "lr_end": 1e-2,
        "n_batches_for_norm_estimate": 4,
        "dead_feature_window": 20,
        **options,
    }
    return SAETrainer(SAETrainerConfig(**given), sae, batches())


# ----------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", TRAINABLE)
def test_sae_lens_trains_our_classes_and_both_load_the_result(name: str, tmp_path: Path) -> None:
    from sae_lens import SAE

    sae = training_sae(name)
    before = explained_variance(sae)
    trainer_of(sae).fit()
    with torch.no_grad():
        assert explained_variance(sae) > max(before, 0.0) + 0.5
        sae.save_inference_model(tmp_path)
        x_ND = sparse_data(500, seed=77_777)
        theirs, ours = SAE.load_from_disk(tmp_path), tcsae.load_sae(tmp_path)
        assert theirs.cfg.architecture() == exported(name).architecture
        assert ours.cfg.architecture == name
        codes_NF = ours.encode(x_ND)
        assert codes_NF.count_nonzero() > 0
        torch.testing.assert_close(sae.encode(x_ND), codes_NF, atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs.encode(x_ND), codes_NF, atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs(x_ND), ours(x_ND), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(D_SAE))
    said = theirs.cfg.metadata
    assert said.training_architecture == PREFIX + name and said.l0 > 0


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_a_step_in_sae_lens_is_a_step_here(name: str) -> None:
    """One Adam step of SAELens' trainer on scaled data against one written out with our class."""
    sae = training_sae(name, normalize_activations="none")
    x_ND = next(batches())
    ours = registry.sae_class(name)(sae.ours.cfg, D_IN)
    ours.load_state_dict(sae.ours.state_dict())
    ours.initialise_from_data(x_ND)
    output = ours.training_forward(
        x_ND.view(16, 16, D_IN),
        torch.ones(16, 16, dtype=torch.bool),
        sparsity_warmup=1.0,
        dead_F=torch.zeros(D_SAE, dtype=torch.bool),
    )
    sum(output.losses.values()).backward()
    ours.project_decoder_gradient()
    torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)

    trainer = trainer_of(sae)
    step = trainer.step(x_ND)
    assert step.losses.keys() >= {"mse_loss"}
    torch.testing.assert_close(step.loss, sum(output.losses.values()))
    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2)
    optimizer.step()
    for (key, mine), theirs in zip(ours.named_parameters(), sae.ours.parameters(), strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=1e-4, msg=key)


def test_the_sparsity_term_warms_up(tmp_path: Path) -> None:
    sae = training_sae("standard", sparsity_warm_up_steps=10)
    trainer = trainer_of(sae)
    first = trainer.step(next(batches())).losses["sparsity"].item()
    later = [trainer.step(next(batches())).losses["sparsity"].item() for _ in range(10)][-1]
    assert first == 0.0 and later > 0


def test_dead_features_come_back(tmp_path: Path) -> None:
    sae = training_sae("topk")
    with torch.no_grad():
        sae.ours.b_enc[:32] = -5.0
    trainer = trainer_of(sae)
    trainer.n_forward_passes_since_fired[:32] = 1000
    step = trainer.step(next(batches()))
    assert step.losses["auxk"] > 0


def test_a_checkpoint_goes_on(tmp_path: Path) -> None:
    from sae_lens import TrainingSAE

    sae = training_sae("matryoshka")
    trainer = trainer_of(sae)
    for _ in range(3):
        trainer.step(next(batches()))
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path)
    assert again.ours.cfg == sae.ours.cfg
    fresh = training_sae("matryoshka")
    fresh.load_weights_from_checkpoint(tmp_path)
    x_ND = sparse_data(50, seed=5)
    with torch.no_grad():
        for copy in (again, fresh):
            assert torch.equal(copy.encode(x_ND), sae.encode(x_ND))
    trainer_of(again, total_training_samples=BATCH * 2).fit()


def test_what_sae_lens_cannot_give_is_refused() -> None:
    with pytest.raises(ValueError, match="revival='resample' needs the optimizer"):
        training_sae("standard", revival="resample")
    with pytest.raises(ValueError, match="normalize_activations='layer_norm'"):
        training_sae("topk", normalize_activations="layer_norm")
    with pytest.raises(ValueError, match="apply_b_dec_to_input must be True"):
        training_sae("topk", apply_b_dec_to_input=False)


def test_architectures_that_look_at_other_tokens_are_not_offered() -> None:
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    offered = {n.removeprefix(PREFIX) for n in SAE_TRAINING_CLASS_REGISTRY if PREFIX in n}
    assert {"topk", "standard", "gated", "jumprelu"} <= offered == {*TRAINABLE, "stranger"}
    assert "tsae" not in offered


# ---------------------------------------------------------------------------------- inference


def test_an_architecture_that_sae_lens_has_not_loads_once_it_is_registered(tmp_path: Path) -> None:
    from sae_lens import SAE

    cfg = StrangerConfig(d_sae=D_SAE, floor=0.25)
    sae = disturb(StrangerSAE(cfg, D_IN, torch.Generator().manual_seed(0)), 0.2)
    save_saelens(tmp_path / "ours", sae, {"model_name": "gpt2"})
    theirs = SAE.load_from_disk(tmp_path / "ours")
    assert theirs.cfg.architecture() == "stranger" and theirs.cfg.floor == 0.25
    x_ND = torch.randn(100, D_IN)
    with torch.no_grad():
        wanted_NF = sae.encode(x_ND)
        assert not torch.allclose(sae.gain, torch.ones(D_SAE)) and (wanted_NF > 0).any()
        assert torch.equal(theirs.encode(x_ND), wanted_NF)
        assert torch.equal(theirs(x_ND), sae(x_ND))
        theirs.save_model(tmp_path / "again")
        for again in (SAE.load_from_disk(tmp_path / "again"), tcsae.load_sae(tmp_path / "again")):
            assert torch.equal(again.encode(x_ND), wanted_NF)
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["floor"] == 0.25
    assert theirs.W_dec is theirs.ours.W_dec and theirs.cfg.metadata.model_name == "gpt2"


@pytest.mark.parametrize("name", sae_configs.architectures())
def test_every_architecture_of_ours_loads_in_sae_lens(name: str, tmp_path: Path) -> None:
    from sae_lens import SAE

    cfg = registry.config_class(name)(architecture=name, d_sae=256)
    sae = registry.sae_class(name)(cfg, 64, torch.Generator().manual_seed(0))
    save_saelens(tmp_path, sae)
    theirs = SAE.load_from_disk(tmp_path)
    x_BTD = torch.randn(3, 8, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x_BTD), sae.encode(x_BTD), atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs(x_BTD), sae(x_BTD), atol=1e-4, rtol=0)


def test_registering_again_changes_nothing() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    before = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)
    tcsae.register_with_saelens()
    assert before == (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY)


# -------------------------------------------------------------------------------- not there


def test_sae_lens_is_imported_when_it_is_asked_for_and_its_absence_is_one_clear_error() -> None:
    code = (
        "import sys, tcsae; register = tcsae.register_with_saelens;"
        "assert not [m for m in sys.modules if m.startswith('sae_lens')];"
        "sys.modules['sae_lens'] = None\n"
        "try:\n    register()\nexcept Exception as error:\n"
        "    print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("UserError sae-lens cannot be imported")
    assert "pip install" in done.stdout and len(done.stdout.splitlines()) == 1
