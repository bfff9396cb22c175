"""dictionary_learning's folders: the same codes as its own formulas, and nothing unpickled.

The reference encoders are the formulas of dictionary_learning 0.1.0, with its tensor names.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tcsae
from tcsae.base.errors import UserError
from tcsae.sae.formats.dictionary_learning import load_dictionary_learning

D_IN, D_SAE, K = 12, 40, 6
State = dict[str, Tensor]
GROUPS = [3, 9, 28]


def linear(state: State, x: Tensor, name: str) -> Tensor:
    """torch.nn.Linear, as they have it."""
    return torch.nn.functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def autoencoder(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    """AutoEncoder after from_pretrained, which normalises the decoder."""
    norms = s["decoder.weight"].norm(dim=0)
    encoder = {
        "e.weight": s["encoder.weight"] * norms[:, None],
        "e.bias": s["encoder.bias"] * norms,
    }
    f = linear(encoder, x - s["bias"], "e").relu()
    return f, f @ (s["decoder.weight"] / norms).T + s["bias"]


def autoencoder_new(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    f = linear(s, x, "encoder").relu()
    return f, linear(s, f, "decoder")


def topk(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    post = linear(s, x - s["b_dec"], "encoder").relu()
    top = post.topk(int(s["k"]), dim=-1)
    f = torch.zeros_like(post).scatter_(-1, top.indices, top.values)
    return f, linear(s, f, "decoder") + s["b_dec"]


def batchtopk(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    post = linear(s, x - s["b_dec"], "encoder").relu()
    f = post * (post > s["threshold"])
    return f, linear(s, f, "decoder") + s["b_dec"]


def matryoshka(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    post = ((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"]).relu()
    f = post * (post > s["threshold"])
    return f, f @ s["W_dec"] + s["b_dec"]


def jumprelu(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    pre = x @ s["W_enc"] + s["b_enc"]
    f = (pre * (pre > s["threshold"])).relu()
    return f, f @ s["W_dec"] + s["b_dec"]


def gated(s: State, x: Tensor) -> tuple[Tensor, Tensor]:
    projected = linear(s, x - s["decoder_bias"], "encoder")
    gate = (projected + s["gate_bias"] > 0).float()
    f = gate * (s["r_mag"].exp() * projected + s["mag_bias"]).relu()
    return f, linear(s, f, "decoder") + s["decoder_bias"]


LINEAR = {"encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE)}
BIASED = LINEAR | {"encoder.bias": (D_SAE,)}
PLAIN = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
SCALARS = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.6)}
Reference = Callable[[State, Tensor], tuple[Tensor, Tensor]]
CLASSES: dict[str, tuple[str, Reference, dict[str, tuple[int, ...]], State]] = {
    "AutoEncoder": ("standard", autoencoder, BIASED | {"bias": (D_IN,)}, {}),
    "AutoEncoderNew": ("standard", autoencoder_new, BIASED | {"decoder.bias": (D_IN,)}, {}),
    "AutoEncoderTopK": ("topk", topk, BIASED | {"b_dec": (D_IN,)}, SCALARS),
    "BatchTopKSAE": ("batchtopk", batchtopk, BIASED | {"b_dec": (D_IN,)}, SCALARS),
    "MatryoshkaBatchTopKSAE": (
        "matryoshka",
        matryoshka,
        PLAIN,
        SCALARS | {"group_sizes": torch.tensor(GROUPS)},
    ),
    "JumpReluAutoEncoder": ("jumprelu", jumprelu, PLAIN | {"threshold": (D_SAE,)}, {}),
    "GatedAutoEncoder": (
        "gated",
        gated,
        LINEAR
        | {"decoder_bias": (D_IN,), "r_mag": (D_SAE,), "gate_bias": (D_SAE,), "mag_bias": (D_SAE,)},
        {},
    ),
}
every_class = pytest.mark.parametrize("name", CLASSES)


def state_of(name: str) -> State:
    generator = torch.Generator().manual_seed(3)
    shapes, scalars = CLASSES[name][2:]
    random = {n: 0.4 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    return random | scalars


def config_of(name: str) -> dict[str, Any]:
    trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "lr": 1e-3}
    return {"trainer": trainer | ({"k": K} if "k" in CLASSES[name][3] else {}), "buffer": {}}


def write(folder: Path, name: str, state: Any = None, **trainer: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = config_of(name)
    config["trainer"].update(trainer)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state_of(name) if state is None else state, folder / "ae.pt")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        tcsae.load_sae(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


# ---------------------------------------------------------------- the same codes


@every_class
def test_codes_and_reconstructions_are_those_of_its_own_formula(name: str, tmp_path: Path) -> None:
    architecture, reference, _, _ = CLASSES[name]
    sae = tcsae.load_sae(write(tmp_path, name))
    assert sae.cfg.architecture == architecture and (sae.d_in, sae.d_sae) == (D_IN, D_SAE)
    x_ND = 2 * torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1)) + 1
    wanted_NF, wanted_ND = reference(state_of(name), x_ND)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x_ND), wanted_NF, atol=1e-5, rtol=0)
        torch.testing.assert_close(sae(x_ND), wanted_ND, atol=1e-5, rtol=0)
    assert (wanted_NF > 0).any(0).sum() > D_SAE / 2


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set_lets_all_positive_features_fire(
    name: str, tmp_path: Path
) -> None:
    state = state_of(name) | {"threshold": torch.tensor(-1.0)}
    x_ND = torch.randn(50, D_IN)
    with torch.no_grad():
        f_NF = tcsae.load_sae(write(tmp_path, name, state)).encode(x_ND)
    torch.testing.assert_close(f_NF, CLASSES[name][1](state, x_ND)[0], atol=1e-5, rtol=0)


# 29 / 100 * 100 and 1 / 49 * 49 come out below the whole number.
@pytest.mark.parametrize("sizes", [GROUPS, [29, 71], [1, 1, 47], [7, 7, 7, 7, 12]])
def test_group_sizes_come_back_exactly(sizes: list[int], tmp_path: Path) -> None:
    d_sae, name = sum(sizes), "MatryoshkaBatchTopKSAE"
    wide = {n: (t.repeat_interleave(3, 0)[:d_sae]) for n, t in state_of(name).items() if t.ndim}
    wide["W_enc"], wide["b_dec"] = wide["W_dec"].T.contiguous(), state_of(name)["b_dec"]
    state = {**state_of(name), **wide, "group_sizes": torch.tensor(sizes)}
    assert tcsae.load_sae(write(tmp_path, name, state, dict_size=d_sae)).cfg.group_sizes == sizes


def test_an_older_topk_file_has_its_k_in_the_config_alone(tmp_path: Path) -> None:
    old = {n: t for n, t in state_of("AutoEncoderTopK").items() if n not in SCALARS}
    assert tcsae.load_sae(write(tmp_path, "AutoEncoderTopK", old)).cfg.k == K


def test_loading_leaves_the_random_state_and_gives_the_config(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    sae, config = load_dictionary_learning(write(tmp_path, "AutoEncoder"))
    assert torch.equal(torch.get_rng_state(), before)
    assert config == config_of("AutoEncoder") and sae.dtype == torch.float32
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    half = {n: t.bfloat16() for n, t in state_of("GatedAutoEncoder").items()}
    sae = tcsae.load_sae(write(tmp_path, "GatedAutoEncoder", half))
    assert torch.equal(sae.W_enc, half["encoder.weight"].float().T)


# ---------------------------------------------------------------- which file


def checkpointed(folder: Path, *steps: int) -> Path:
    """A trainer's folder with checkpoints, each of its own weights, and no ae.pt."""
    write(folder, "AutoEncoderTopK")
    (folder / "ae.pt").unlink()
    (folder / "checkpoints").mkdir()
    for step in steps:
        state = state_of("AutoEncoderTopK")
        state["b_dec"] = torch.full((D_IN,), float(step))
        torch.save(state, folder / "checkpoints" / f"ae_{step}.pt")
    return folder


def test_a_checkpoint_is_read_with_the_config_one_folder_up(tmp_path: Path) -> None:
    folder = checkpointed(tmp_path / "trainer_0", 10, 200)
    for step in (10, 200):
        sae = tcsae.load_sae(folder / "checkpoints" / f"ae_{step}.pt")
        assert sae.b_dec.unique().tolist() == [step] and sae.cfg.k == K
    said = refusal(folder)
    assert "several checkpoints: give one of checkpoints/ae_10.pt, checkpoints/ae_200.pt" in said
    assert "give one of ae_10.pt, ae_200.pt" in refusal(folder / "checkpoints")
    (folder / "checkpoints" / "ae_10.pt").unlink()
    for path in (folder, folder / "checkpoints"):
        assert tcsae.load_sae(path).b_dec.unique().tolist() == [200]
    # The trained one goes before a checkpoint.
    torch.save(state_of("AutoEncoderTopK"), folder / "ae.pt")
    for path in (folder, folder / "ae.pt"):
        assert torch.equal(tcsae.load_sae(path).b_dec, state_of("AutoEncoderTopK")["b_dec"])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("trainer", "buffer", "says"),
    [
        ({}, {"io": "in_and_out"}, "buffer.io is 'in_and_out': a transcoder"),
        ({}, {"io": ["out"]}, "buffer.io is ['out']"),
        ({}, {"d_submodule": 64}, "buffer.d_submodule is 64, but trainer.activation_dim 12"),
        (
            {"layer": 3, "submodule_name": "resid_post_layer_4"},
            {},
            "layer is 3, but submodule_name resid_post_layer_4",
        ),
        ({"trainer_class": "TopKTrainer"}, {}, "TopKTrainer trains AutoEncoderTopK, but dict_cl"),
        ({"activation_dim": "12"}, {}, "activation_dim is '12', it must be an integer"),
        ({"dict_size": -1}, {}, "dict_size is -1, it must be an integer above 0"),
    ],
)
def test_a_config_that_contradicts_itself_or_is_a_transcoders_is_refused(
    trainer: dict[str, Any], buffer: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, "AutoEncoder", **trainer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"buffer": buffer}))
    assert says in refusal(folder)


@pytest.mark.parametrize("made_by", ["PAnnealTrainer", "MyTrainer", None])
def test_a_trainer_that_fits_or_is_not_known_is_no_matter(made_by: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "AutoEncoder", trainer_class=made_by)
    assert tcsae.load_sae(folder).cfg.architecture == "standard"


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.target,))


@pytest.mark.parametrize("form", ["pickle", "torch", "torch, before 1.6"])
def test_a_pickle_with_code_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    folder, target = write(tmp_path / "sae", "AutoEncoder"), tmp_path / "exploded"
    state = state_of("AutoEncoder") | {"bias": Bomb(target)}
    with open(folder / "ae.pt", "wb") as file:
        if form == "pickle":
            pickle.dump(state, file)
        else:
            torch.save(state, file, _use_new_zipfile_serialization=form == "torch")
    assert "may hold code" in refusal(folder)
    assert not target.exists()
    torch.load(folder / "ae.pt", weights_only=False) if form != "pickle" else pickle.loads(
        (folder / "ae.pt").read_bytes()
    )
    assert target.exists(), "the bomb was a dud"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bias": None}, "bias missing"),
        ({"extra": torch.zeros(3)}, "extra not expected"),
        ({"bias": torch.zeros(D_IN + 1)}, "b_dec is [13]"),
        ({"encoder.weight": torch.zeros(D_IN, D_SAE)}, "W_enc is [40, 12]"),
        ({"encoder.weight": torch.zeros(D_IN)}, "not a matrix"),
        ({"bias": torch.zeros(D_IN, dtype=torch.int32)}, "int32"),
        ({"bias": "text"}, "more than tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    state = {n: t for n, t in (state_of("AutoEncoder") | changes).items() if t is not None}
    assert says in refusal(write(tmp_path, "AutoEncoder", state))


def test_another_width_or_k_than_the_configs_is_refused(tmp_path: Path) -> None:
    assert "activation_dim 16" in refusal(write(tmp_path, "AutoEncoder", activation_dim=16))
    assert "dict_size 80" in refusal(write(tmp_path, "GatedAutoEncoder", dict_size=80))
    assert "k is 6 and 8" in refusal(write(tmp_path, "AutoEncoderTopK", k=8))
    state = state_of("AutoEncoderTopK") | {"k": torch.tensor(41)}
    assert "k is 41" in refusal(write(tmp_path, "AutoEncoderTopK", state, k=41))
    state = state_of("MatryoshkaBatchTopKSAE") | {"group_sizes": torch.tensor([3, 4])}
    assert "do not add up" in refusal(write(tmp_path, "MatryoshkaBatchTopKSAE", state))
    said = refusal(write(tmp_path, "MatryoshkaBatchTopKSAE", group_sizes=[20, 20]))
    assert "group_sizes are [3, 9, 28] in ae.pt, but [20, 20] in config.json" in said
    state = {n: t for n, t in state_of("BatchTopKSAE").items() if n != "threshold"}
    assert "threshold missing" in refusal(write(tmp_path, "BatchTopKSAE", state))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{broken", "not JSON"),
        ("[1]", "not an object"),
        ('{"architecture": "topk", "d_in": 12}', "no trainer.dict_class"),
        ('{"trainer": {"dict_class": "IdentityDict"}}', "has no features"),
        ('{"trainer": {"dict_class": "CrossCoder"}}', "reads several layers or models at once"),
        ('{"trainer": {"dict_class": "MySAE"}}', "unknown dict_class 'MySAE': known are AutoEnc"),
        ('{"trainer": {"dict_class": ["AutoEncoder"]}}', "unknown dict_class"),
    ],
)
def test_a_config_of_another_kind_is_refused(text: str, says: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "AutoEncoder")
    (folder / "config.json").write_text(text)
    assert says in refusal(folder)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "AutoEncoder")
    whole = (folder / "ae.pt").read_bytes()
    for left in (whole[: len(whole) // 2], b""):
        (folder / "ae.pt").write_bytes(left)
        assert "ae.pt is damaged" in refusal(folder)
    torch.save([1, 2], folder / "ae.pt")
    assert "more than tensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json beside ae.pt nor one folder up" in refusal(folder)
    (folder / "ae.pt").unlink()
    assert "no cfg.json" in refusal(folder)
