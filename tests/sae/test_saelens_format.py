"""The folder format: SAELens reads what we write, and what is not ours is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from saes import build, disturb, every_variant
from safetensors.torch import load_file, save_file
from torch import Tensor

from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats import saelens
from tcsae.sae.formats.saelens import CFG_NAME, WEIGHTS_NAME, load_saelens, save_saelens
from tcsae.sae.formats.saelens_registry import register

D_IN, D_SAE = 12, 40
OPTIONS: dict[str, dict[str, Any]] = {"topk": {"k": 6}, "standard": {"l1_coefficient": 0.3}}
EXPORTED_AS = {
    "p_anneal": "standard",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "matryoshka, token": "topk",
    "tsae": "jumprelu",
    "tfa": "temporal",
}
METADATA = {
    "model_name": "gpt2",
    "hook_name": "blocks.6.hook_resid_post",
    "context_size": 128,
    "window": 8,
    "lambda": 0.1,
    "tcsae": {"seed": 7, "training": {"lr": 1e-3}},
}


def trained(name: str) -> SparseAutoencoder:
    """Non-trivial biases and thresholds, unit-norm rows, a folded input scale."""
    sae = disturb(build(name, D_IN, **{"d_sae": D_SAE, **OPTIONS.get(name, {})}), 0.3)
    sae.fold_input_scale(0.25)
    return sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_saelens(tmp_path / "sae", trained("topk"), METADATA)
    return tmp_path / "sae"


def edit_cfg(folder: Path, **changes: Any) -> None:
    cfg = json.loads((folder / CFG_NAME).read_text())
    cfg.update(changes)
    (folder / CFG_NAME).write_text(json.dumps({k: v for k, v in cfg.items() if v != "DROP"}))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS_NAME), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS_NAME)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_saelens(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


# ---------------------------------------------------------------- SAELens reads it


@every_variant
def test_sae_lens_gives_the_same_codes_and_reconstructions(name: str, tmp_path: Path) -> None:
    from sae_lens import SAE

    register()
    sae = trained(name)
    save_saelens(tmp_path, sae, METADATA)
    theirs = SAE.load_from_disk(tmp_path)
    architecture = name.partition(",")[0]
    expected = EXPORTED_AS.get(name, EXPORTED_AS.get(architecture, architecture))
    assert theirs.cfg.architecture() == expected
    x_BTD = 4 * torch.randn(10, 20, D_IN) + 1
    with torch.no_grad():
        codes_BTF = sae.encode(x_BTD)
        if name != "tfa, predictive":  # SAELens gives the novel codes
            torch.testing.assert_close(theirs.encode(x_BTD), codes_BTF, atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs(x_BTD), sae(x_BTD), atol=1e-4, rtol=0)
        assert (codes_BTF > 0).flatten(0, 1).any(0).sum() > D_SAE / 2
    metadata = theirs.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("gpt2", "blocks.6.hook_resid_post")
    assert metadata.window == 8 and metadata.tcsae["sae"]["architecture"] == architecture
    assert theirs.cfg.d_in == D_IN and theirs.cfg.dtype == "float32"


@pytest.mark.parametrize("name", ["standard", "jumprelu", "gated"])
def test_what_sae_lens_saved_itself_gives_the_same_here(name: str, tmp_path: Path) -> None:
    from sae_lens import (
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
    )

    classes: dict[str, Any] = {
        "standard": (StandardSAE, StandardSAEConfig),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
        "gated": (GatedSAE, GatedSAEConfig),
    }
    their_class, their_cfg = classes[name]
    theirs = their_class(their_cfg(d_in=D_IN, d_sae=D_SAE))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.save_model(tmp_path)
    ours, _ = load_saelens(tmp_path)
    assert ours.cfg.architecture == name
    x_ND = torch.randn(200, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x_ND), theirs.encode(x_ND), atol=1e-4, rtol=0)
        torch.testing.assert_close(ours(x_ND), theirs(x_ND), atol=1e-4, rtol=0)


@pytest.mark.parametrize("centred", [True, False])
def test_a_topk_sae_that_sae_lens_trained_with_rescaled_codes_is_read_right(
    centred: bool, tmp_path: Path
) -> None:
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    rescaled = TopKSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=6,
        rescale_acts_by_decoder_norm=True,
        apply_b_dec_to_input=centred,
    )
    theirs = TopKSAE(rescaled)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.save_model(tmp_path)
    ours, cfg = load_saelens(tmp_path)
    assert cfg["rescale_acts_by_decoder_norm"] is True
    x_ND = torch.randn(200, D_IN)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x_ND), theirs.encode(x_ND), atol=1e-4, rtol=0)
        torch.testing.assert_close(ours(x_ND), theirs(x_ND), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["standard", "topk", "jumprelu", "gated"])
def test_an_encoder_that_does_not_subtract_b_dec_gives_the_same_codes(
    name: str, tmp_path: Path
) -> None:
    from sae_lens import SAE

    save_saelens(tmp_path / "theirs", trained(name))
    edit_cfg(tmp_path / "theirs", apply_b_dec_to_input=False)
    theirs = SAE.load_from_disk(tmp_path / "theirs")
    assert theirs.cfg.apply_b_dec_to_input is False
    ours, _ = load_saelens(tmp_path / "theirs")
    save_saelens(tmp_path / "again", ours)
    again = SAE.load_from_disk(tmp_path / "again")
    x_ND = 4 * torch.randn(200, D_IN) + 1
    with torch.no_grad():
        wanted_NF = theirs.encode(x_ND)
        assert not torch.allclose(trained(name).encode(x_ND), wanted_NF, atol=1e-2)
        for sae in (ours, again):
            torch.testing.assert_close(sae.encode(x_ND), wanted_NF, atol=1e-4, rtol=0)
            torch.testing.assert_close(sae(x_ND), theirs(x_ND), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- what is written


@every_variant
def test_a_saved_sae_comes_back_the_same(name: str, tmp_path: Path) -> None:
    sae = trained(name)
    save_saelens(tmp_path, sae, METADATA)
    before = torch.get_rng_state()
    copy, cfg = load_saelens(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(copy) is type(sae) and copy.cfg == sae.cfg
    state = sae.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in copy.state_dict().items())
    assert cfg["metadata"]["tcsae"]["training"] == {"lr": 1e-3}


def test_cfg_has_every_key_that_sae_lens_knows(folder: Path) -> None:
    cfg = json.loads((folder / CFG_NAME).read_text())
    metadata = cfg.pop("metadata")
    assert cfg == {
        "architecture": "topk",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": 6,
        "rescale_acts_by_decoder_norm": False,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    asked = (
        "sae_lens_version model_name hook_name context_size prepend_bos hook_head_index "
        "model_from_pretrained_kwargs seqpos_slice exclude_special_tokens dataset_path "
        "training_architecture window lambda tcsae"
    )
    assert set(asked.split()) <= set(metadata)
    assert metadata["seqpos_slice"] == [None] and metadata["training_architecture"] == "topk"
    tensors = load_file(folder / WEIGHTS_NAME)
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        "W_enc": [D_IN, D_SAE],
        "b_enc": [D_SAE],
        "W_dec": [D_SAE, D_IN],
        "b_dec": [D_IN],
    }
    assert {t.dtype for t in tensors.values()} == {torch.float32}


@every_variant
def test_the_tensors_are_those_that_sae_lens_expects(name: str, tmp_path: Path) -> None:
    save_saelens(tmp_path, trained(name))
    exported = json.loads((tmp_path / CFG_NAME).read_text())["architecture"]
    further = {
        "standard": {"b_enc"},
        "topk": {"b_enc"},
        "jumprelu": {"b_enc", "threshold"},
        "gated": {"b_gate", "b_mag", "r_mag"},
        "persistent": {"b_enc", "theta"},
        "temporal": {
            f"attn_layers.0.{layer}.{kind}"
            for layer in ("k_ctx", "q_target", "v_ctx", "c_proj")
            for kind in ("weight", "bias")
        },
    }
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert set(tensors) == {"W_enc", "W_dec", "b_dec"} | further[exported]
    if exported != "temporal":
        assert all(tensors[vector].shape == (D_SAE,) for vector in further[exported])


def test_saving_leaves_two_files_that_others_may_read(folder: Path) -> None:
    save_saelens(folder, trained("standard"))
    assert sorted(p.name for p in folder.iterdir()) == [CFG_NAME, WEIGHTS_NAME]
    plain = folder / "plain"
    plain.touch()
    wanted = stat.S_IMODE(plain.stat().st_mode)
    assert {stat.S_IMODE((folder / n).stat().st_mode) for n in (CFG_NAME, WEIGHTS_NAME)} == {wanted}
    assert load_saelens(folder)[0].cfg.architecture == "standard"


def test_metadata_that_is_not_json_fails_before_anything_is_touched(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError):
        save_saelens(folder, trained("standard"), {"window": float("nan")})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_cfg_is_replaced_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []
    original = os.replace

    def spy(source: Any, target: Any) -> None:
        replaced.append(Path(target).name)
        assert folder in Path(source).parents
        original(source, target)

    monkeypatch.setattr(os, "replace", spy)
    save_saelens(folder, trained("topk"), METADATA)
    assert replaced == [WEIGHTS_NAME, CFG_NAME]


# ---------------------------------------------------------------- what is read


def test_weights_in_half_precision_are_read_as_float32(folder: Path) -> None:
    half = {k: v.to(torch.bfloat16) for k, v in load_file(folder / WEIGHTS_NAME).items()}
    save_file(half, folder / WEIGHTS_NAME)
    sae, _ = load_saelens(folder)
    assert sae.dtype == torch.float32
    assert torch.equal(sae.W_dec, half["W_dec"].float())


def test_a_folder_without_our_metadata_is_read_by_its_cfg_alone(folder: Path) -> None:
    edit_cfg(folder, metadata="DROP")
    sae, _ = load_saelens(folder)
    assert sae.cfg == build("topk", d_sae=D_SAE, k=6).cfg


def old_folder(folder: Path, cfg: dict[str, Any], **tensors: Tensor) -> Path:
    """As a SAELens before version 6 left it: no metadata, everything at the top."""
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    W_enc = torch.randn(D_IN, D_SAE, generator=generator)
    b_enc = 0.1 * torch.randn(D_SAE, generator=generator)
    b_dec = 0.1 * torch.randn(D_IN, generator=generator)
    folder.mkdir()
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **tensors}
    save_file(weights, folder / WEIGHTS_NAME)
    (folder / CFG_NAME).write_text(json.dumps({"d_in": D_IN, "d_sae": D_SAE, **cfg}))
    return folder


AT = {"hook_name": "blocks.1.hook_resid_pre", "hook_layer": 1, "model_name": "gpt2-small"}
REST = {"dtype": "float32", "device": "cpu", "finetuning_scaling_factor": False}
TOPK = {"activation_fn_kwargs": {"k": 5}}
OLD: dict[str, dict[str, Any]] = {
    "5, topk": {"architecture": "topk", "activation_fn_str": "topk", **TOPK, **AT},
    "5, jumprelu": {"architecture": "jumprelu", "activation_fn_str": "relu", **AT},
    "4, topk in standard": {"architecture": "standard", "activation_fn_str": "topk", **TOPK, **AT},
    "4, the runner's name": {"architecture": "standard", "activation_fn": "topk", **TOPK, **AT},
    "4, relu": {"architecture": "standard", "activation_fn_str": "relu", **AT},
    "4, without b_dec": {"architecture": "standard", "apply_b_dec_to_input": False, **AT},
    "3, no architecture": {"activation_fn": "relu", "normalize_activations": False, **AT},
    "3, topk": {"activation_fn": "topk", **TOPK, "normalize_activations": None, **AT},
    "2, hook_point": {"hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1},
}


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaling factor of ones"])
@pytest.mark.parametrize("form", OLD)
def test_older_folders_are_computed_as_sae_lens_does(
    form: str, scaled: bool, tmp_path: Path
) -> None:
    from sae_lens import SAE

    tensors = {"scaling_factor": torch.ones(D_SAE)} if scaled else {}
    if "jumprelu" in form:
        tensors["threshold"] = torch.rand(D_SAE)
    folder = old_folder(tmp_path / "sae", {**REST, **OLD[form]}, **tensors)
    theirs, (ours, _) = SAE.load_from_disk(str(folder)), load_saelens(folder)
    x_ND = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))
    codes_NF = theirs.encode(x_ND)
    torch.testing.assert_close(ours.encode(x_ND), codes_NF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x_ND), theirs.decode(codes_NF), rtol=1e-5, atol=1e-5)
    assert (codes_NF > 0).sum(1).float().mean() == 5 or "topk" not in form


def test_a_scaling_factor_that_scales_is_refused(tmp_path: Path) -> None:
    factor = torch.full((D_SAE,), 1.1)
    cfg = {**REST, **OLD["4, relu"], "finetuning_scaling_factor": True}
    assert "is not 1 everywhere" in refusal(
        old_folder(tmp_path / "sae", cfg, scaling_factor=factor)
    )


def test_every_key_that_sae_lens_writes_is_known() -> None:
    import dataclasses

    from sae_lens.config import LanguageModelSAERunnerConfig
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    from tcsae.sae.formats.saelens_cfg import _CHANGES_NOTHING, _UNDERSTOOD

    not_read = ("transcoder", "matching_pursuit")  # refused by their names
    written = {field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)} - {"sae"}
    for registry in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY):
        for name, (_, config) in registry.items():
            theirs = config.__module__.startswith("sae_lens")
            if theirs and not any(part in name for part in not_read):
                written |= {field.name for field in dataclasses.fields(config)}
    assert written - _UNDERSTOOD - _CHANGES_NOTHING == set()


# ---------------------------------------------------------------- what is refused


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    assert "no such folder" in refusal(folder / "nosuch")
    assert "no such folder" in refusal(folder / CFG_NAME)
    (folder / WEIGHTS_NAME).rename(folder / "away")
    assert f"no {WEIGHTS_NAME}" in refusal(folder)
    (folder / CFG_NAME).unlink()
    assert f"no {CFG_NAME}" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "not SAELens"),
        ("\x00\x01binary", "not JSON"),
        # dictionary_learning's config.json and sparsify's cfg.json
        ('{"trainer": {"dict_class": "AutoEncoder", "dict_size": 64}}', "no architecture, d_in"),
        ('{"activation": "topk", "num_latents": 64, "k": 32, "d_in": 12}', "no architecture"),
    ],
)
def test_a_cfg_of_another_library_is_refused(folder: Path, text: str, says: str) -> None:
    (folder / CFG_NAME).write_text(text)
    assert says in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "nosuch", "metadata": "DROP"}, "known are standard, topk"),
        ({"architecture": ["topk"], "metadata": {}}, "unknown architecture"),
        ({"metadata": {"tcsae": {"sae": {"architecture": "later"}}}}, "unknown architecture"),
        ({"d_in": "12"}, "d_in is '12'"),
        ({"d_sae": 0}, "d_sae is 0"),
        ({"d_in": D_IN + 4}, "W_dec is [40, 12]"),
        ({"d_sae": 10**12}, "W_dec is [40, 12]"),
        ({"d_sae": D_SAE - 8}, "d_sae 32"),
        ({"k": "DROP"}, "no k"),
        ({"k": 41}, "k is 41"),
        ({"k": 2.5}, "k=2.5"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input=None"),
        ({"normalize_activations": "expected_average_only_in"}, "factor of the activations"),
        ({"normalize_activations": "covariance_whitening"}, "whitening is not in the folder"),
        ({"normalize_activations": "constant_norm_rescale"}, "no weights can hold"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn='tanh-relu'"),
        ({"activation_fn": "topk", "architecture": "jumprelu"}, "with architecture 'jumprelu'"),
        ({"activation_fn_kwargs": {"k": 3}}, "activation_fn_kwargs={'k': 3}"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 3, "x": 1}}, "only k is known"),
        (
            {"activation_fn": "topk", "activation_fn_kwargs": {"k": 3}},
            "k is 6, but activation",
        ),
        ({"hook_layer": 5}, "hook_layer is 5, but hook_name blocks.6.hook_resid_post"),
        ({"hook_point_layer": 7}, "hook_layer is 7, but hook_name blocks.6"),
        ({"normalize_activations": True, "metadata": "DROP"}, "factor of the activations"),
        ({"output_scale": 2.0, "metadata": {}}, "output_scale=2.0 is not known here"),
        ({"zz": 3, "metadata": {"tcsae": {}}}, "zz=3 is not known here"),
        ({"metadata": {"hook_head_index": 3}}, "of one attention head"),
        ({"architecture": "standard", "rescale_acts_by_decoder_norm": True}, "only with 'topk'"),
    ],
)
def test_a_cfg_that_does_not_fit_is_refused(
    folder: Path, changes: dict[str, Any], says: str
) -> None:
    edit_cfg(folder, **changes)
    assert says in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"b_enc": None}, "b_enc missing"),
        ({"W_dec": None}, "W_dec missing"),
        ({"threshold": torch.zeros(D_SAE)}, "threshold not expected"),
        ({"b_dec": torch.zeros(D_IN + 1)}, "b_dec is [13]"),
        ({"W_enc": torch.zeros(D_SAE, D_IN)}, "W_enc is [40, 12]"),
        ({"b_dec": torch.zeros(D_IN, dtype=torch.int32)}, "not floating point"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, changes: dict[str, Tensor | None], says: str
) -> None:
    edit_tensors(folder, **changes)
    assert says in refusal(folder)


def test_shapes_are_refused_by_the_header_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(saelens, "read_safetensors", loaded.append)
    edit_tensors(folder, b_enc=torch.zeros(D_SAE + 1))
    assert "b_enc is [41]" in refusal(folder)
    edit_tensors(folder, b_enc=None)
    assert "b_enc missing" in refusal(folder) and loaded == []


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_posing_as_weights_is_refused_and_not_opened(folder: Path, form: str) -> None:
    target = folder / "exploded"
    with open(folder / WEIGHTS_NAME, "wb") as file:
        (pickle.dump if form == "pickle" else torch.save)({"W_enc": Bomb(target)}, file)
    assert "pickle" in refusal(folder)
    assert not target.exists()


@pytest.mark.parametrize("name", ["ae.pt", "sae_weights.pt", "pytorch_model.bin"])
def test_weights_under_another_name_are_not_looked_at(folder: Path, name: str) -> None:
    (folder / WEIGHTS_NAME).rename(folder / name)
    assert f"no {WEIGHTS_NAME}" in refusal(folder)


def test_truncated_or_empty_weights_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS_NAME).read_bytes()
    for left in (whole[: len(whole) // 2], whole[:5], b""):
        (folder / WEIGHTS_NAME).write_bytes(left)
        assert "damaged" in refusal(folder)
