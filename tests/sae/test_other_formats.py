"""sparsify's folders, Gemma Scope's params.npz, OpenAI's .pt: the same codes as their own formulas.

The references are the formulas of each library's own encoder and decoder, with its tensor names.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tcsae
from tcsae.base.errors import UserError
from tcsae.jobs.foreign import from_folder
from tcsae.sae.formats import sparsify
from tcsae.sae.formats.known import is_known

D_IN, D_SAE, K = 12, 40, 6
State = dict[str, Tensor]


def random(*shape: int, seed: int = 3) -> Tensor:
    return 0.4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


X_ND = 2 * torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1)) + 1


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        tcsae.load_sae(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def same(path: Path, wanted_NF: Tensor, wanted_ND: Tensor, architecture: str) -> None:
    sae = tcsae.load_sae(path)
    assert sae.cfg.architecture == architecture and (sae.d_in, sae.d_sae) == (
        D_IN,
        wanted_NF.shape[1],
    )
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(X_ND), wanted_NF, atol=1e-5, rtol=0)
        torch.testing.assert_close(sae(X_ND), wanted_ND, atol=1e-5, rtol=0)
    assert (wanted_NF > 0).any(0).sum() > D_SAE / 2


# ---------------------------------------------------------------- sparsify


SPARSIFY: State = {
    "encoder.weight": random(D_SAE, D_IN),
    "encoder.bias": random(D_SAE),
    "W_dec": random(D_SAE, D_IN, seed=4),
    "b_dec": random(D_IN),
}
CFG: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": D_SAE,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}


def of_sparsify(folder: Path, changes: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    folder.mkdir(parents=True)
    cfg = {k: v for k, v in (CFG | (changes or {})).items() if v != "DROP"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(SPARSIFY | tensors, folder / "sae.safetensors")
    return folder


def sparsify_formula(s: State) -> tuple[Tensor, Tensor]:
    pre = torch.nn.functional.linear(X_ND - s["b_dec"], s["encoder.weight"], s["encoder.bias"])
    top = pre.relu().topk(K, dim=-1, sorted=False)
    f = torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
    return f, f @ s["W_dec"] + s["b_dec"]


OLDER = {"activation": "DROP", "num_latents": "DROP", "signed": False, "transcode": "DROP"}


@pytest.mark.parametrize("changes", [{}, OLDER, {"normalize_decoder": False}])
def test_sparsifys_folder_is_read_as_it_computes_itself(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    # Without num_latents the factor says how many: 40 is no multiple of 12.
    rows = 36 if "num_latents" in changes else D_SAE
    tensors = {name: t[:rows].clone() for name, t in SPARSIFY.items() if len(t) == D_SAE}
    changes = changes | ({"expansion_factor": 3} if rows == 36 else {})
    folder = of_sparsify(tmp_path / "sae", changes, **tensors)
    for path in (folder, folder / "sae.safetensors", folder / "cfg.json"):
        same(path, *sparsify_formula(SPARSIFY | tensors), "topk")


def test_sparsifys_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in SPARSIFY.items()}
    sae = tcsae.load_sae(of_sparsify(tmp_path / "sae", **half))
    assert torch.equal(sae.W_dec, half["W_dec"].float())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "groupmax"}, "activation='groupmax': not computed here"),
        ({"skip_connection": True}, "skip_connection=True: it adds a linear map"),
        ({"transcode": True}, "transcode=True: a transcoder"),
        ({"signed": True}, "whatever their sign"),
        ({"signed": 1}, "signed=1"),
        ({"gain": 2.0}, "gain=2.0 is not known here"),
        ({"k": "DROP"}, "k is None"),
        ({"k": True}, "k is True"),
        ({"k": 41}, "k is 41"),
        ({"d_in": 0}, "d_in is 0"),
        ({"d_in": 16}, "W_enc is [12, 40], but d_in 16 and num_latents 40"),
        ({"num_latents": 10**12}, "num_latents 1000000000000 ask for"),
        ({"num_latents": -1}, "num_latents is -1"),
        ({"num_latents": 0, "expansion_factor": None}, "expansion_factor is None"),
    ],
)
def test_a_sparsify_cfg_of_another_function_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in refusal(of_sparsify(tmp_path / "sae", changes))


def test_sparsifys_tensors_must_fit_before_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = of_sparsify(tmp_path / "more", W_skip=torch.zeros(D_IN, D_IN))
    assert "W_skip not expected (sparsify)" in refusal(more)
    whole = of_sparsify(tmp_path / "sae", **{"encoder.bias": torch.zeros(D_SAE + 1)})
    loaded: list[Path] = []
    monkeypatch.setattr(sparsify, "read_safetensors", loaded.append)
    assert "b_enc is [41]" in refusal(whole) and loaded == []
    (whole / "sae.safetensors").write_bytes((whole / "sae.safetensors").read_bytes()[:200])
    assert "damaged" in refusal(whole)
    (whole / "cfg.json").write_text("[]")
    assert "not an object" in refusal(whole)
    (whole / "cfg.json").unlink()
    assert "no cfg.json beside sae.safetensors" in refusal(whole)


# ---------------------------------------------------------------- Gemma Scope


PARAMS: State = {
    "W_enc": random(D_IN, D_SAE),
    "b_enc": random(D_SAE),
    "W_dec": random(D_SAE, D_IN, seed=4),
    "b_dec": random(D_IN),
    "threshold": random(D_SAE, seed=5).abs(),
}


def of_gemma(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    arrays = {k: v.numpy() for k, v in PARAMS.items()} | changes
    np.savez(folder / "params.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder


def test_gemma_scopes_params_are_read_as_its_own_formula(tmp_path: Path) -> None:
    s = PARAMS
    pre = X_ND @ s["W_enc"] + s["b_enc"]
    f = (pre > s["threshold"]) * pre.relu()
    folder = of_gemma(tmp_path / "sae")
    for path in (folder, folder / "params.npz"):
        same(path, f, f @ s["W_dec"] + s["b_dec"], "jumprelu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threshold": None}, "threshold missing (Gemma Scope)"),
        ({"scale": np.ones(3)}, "scale not expected"),
        ({"b_dec": np.zeros(13)}, "b_dec is [13]"),
        ({"W_enc": np.zeros((D_SAE, D_IN))}, "b_enc is [40], but W_enc's 40 and 12"),
        ({"W_enc": np.zeros(3)}, "not a matrix"),
        ({"b_dec": np.zeros(D_IN, dtype=int)}, "int64, not floating point"),
        ({"b_dec": np.array([{"a": 1}] * D_IN)}, "b_dec.npy holds Python objects: refused"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in refusal(of_gemma(tmp_path / "sae", **changes))


def test_a_damaged_npz_a_transcoder_and_embeddings_are_refused(tmp_path: Path) -> None:
    file = of_gemma(tmp_path / "sae") / "params.npz"
    whole = file.read_bytes()
    for broken in (whole[:300], b"", b"\x80\x04."):
        file.write_bytes(broken)
        assert "params.npz is damaged" in refusal(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("W_enc.npy", "text")
    assert "params.npz is damaged" in refusal(file)
    np.savez_compressed(file, **{name: tensor.numpy() for name, tensor in PARAMS.items()})
    packed = bytearray(file.read_bytes())
    packed[400:1200] = bytes(800)  # a stream that no longer unpacks
    file.write_bytes(packed)
    assert "params.npz is damaged" in refusal(file)
    assert "a transcoder" in refusal(of_gemma(tmp_path / "gemma-scope-2b-pt-transcoders" / "x"))
    assert "embeddings" in refusal(of_gemma(tmp_path / "embedding" / "width_4k"))


# ---------------------------------------------------------------- OpenAI


OPENAI: dict[str, Any] = {
    "pre_bias": random(D_IN),
    "latent_bias": random(D_SAE),
    "encoder.weight": random(D_SAE, D_IN),
    "decoder.weight": random(D_IN, D_SAE, seed=4),
    "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
    "activation": "ReLU",
    "activation_state_dict": {},
}


def of_openai(file: Path, **changes: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k: v for k, v in (OPENAI | changes).items() if v is not None}, file)
    return file


@pytest.mark.parametrize("changes", [{}, {"activation": None, "activation_state_dict": None}])
def test_openais_relu_is_read_as_its_own_formula(changes: dict[str, Any], tmp_path: Path) -> None:
    s = OPENAI
    pre = torch.nn.functional.linear(X_ND - s["pre_bias"], s["encoder.weight"], s["latent_bias"])
    f = pre.relu()
    wanted_ND = torch.nn.functional.linear(f, s["decoder.weight"]) + s["pre_bias"]
    same(of_openai(tmp_path / "8.pt", **changes), f, wanted_ND, "standard")


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.target,))


def test_what_of_openais_is_not_computed_is_refused_with_the_reason(tmp_path: Path) -> None:
    inner = {"k": 32, "postact_fn": "ReLU"}
    topk = of_openai(tmp_path / "5.pt", activation="TopK", activation_state_dict=inner)
    assert "every token a mean and a factor of its own" in refusal(topk)
    identity = of_openai(tmp_path / "6.pt", activation="Identity")
    assert "activation is 'Identity'" in refusal(identity)
    cut = of_openai(tmp_path / "7.pt", **{"decoder.weight": None})
    assert "decoder.weight missing" in refusal(cut)
    assert "b_dec is [3]" in refusal(of_openai(tmp_path / "8.pt", pre_bias=torch.zeros(3)))
    assert "more than tensors" in refusal(of_openai(tmp_path / "9.pt", pre_bias=[1.0]))
    assert "neither OpenAI's" in refusal(of_openai(tmp_path / "10.pt", pre_bias=None))
    bomb = of_openai(tmp_path / "11.pt", pre_bias=Bomb(tmp_path / "exploded"))
    assert "may hold code" in refusal(bomb) and not (tmp_path / "exploded").exists()
    torch.load(bomb, weights_only=False)
    assert (tmp_path / "exploded").exists(), "the bomb was a dud"
    other = tmp_path / "notes.txt"
    other.write_text("")
    assert "no file of an SAE's weights" in refusal(other)


def test_weights_that_are_no_numbers_are_refused_in_every_format(tmp_path: Path) -> None:
    nan, inf = torch.full((D_IN,), float("nan")), torch.full((D_SAE,), float("inf"))
    for path in (
        of_sparsify(tmp_path / "sparsify", b_dec=nan),
        of_gemma(tmp_path / "gemma", b_dec=nan.numpy()),
        of_openai(tmp_path / "1.pt", pre_bias=nan),
    ):
        assert "b_dec has 12 values that are no finite numbers" in refusal(path)
    never = of_gemma(tmp_path / "never", threshold=inf.numpy())
    assert not tcsae.load_sae(never).encode(X_ND).any()


def test_a_folder_of_saes_or_of_none_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    said = refusal(tmp_path)
    assert said.endswith(
        "no cfg.json (SAELens, sparsify), ae.pt (dictionary_learning) or params.npz (Gemma Scope)"
    )
    for layer in range(4):
        of_sparsify(tmp_path / f"layers.{layer}")
    of_openai(tmp_path / "0.pt")
    assert refusal(tmp_path).endswith("give one of them: 0.pt, layers.0, layers.1 ... (5)")


def test_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    sparse = OPENAI["encoder.weight"].to_sparse()
    assert "is sparse" in refusal(of_openai(tmp_path / "1.pt", **{"encoder.weight": sparse}))


# ---------------------------------------------------------------- what they say of themselves


def run_config(folder: Path, **content: Any) -> None:
    (folder / "config.json").write_text(json.dumps(content))


def sparsify_at(root: Path, module: str) -> Path:
    folder = of_sparsify(root / "run" / module)
    told = {"model": "EleutherAI/pythia-70m", "dataset": "me/pile", "ctx_len": 256}
    run_config(root / "run", **told, exclude_tokens=[0])
    return folder


GEMMA = "models--google--gemma-scope-2b-pt-{}/snapshots/abc/layer_20/width_16k/average_l0_71"
PLACES: list[tuple[str, Callable[[Path], Path], tuple[str | None, str | None, int | None]]] = [
    (
        "sparsify",
        lambda root: sparsify_at(root, "layers.3"),
        ("EleutherAI/pythia-70m", "blocks.3.hook_resid_post", 256),
    ),
    (
        "sparsify",
        lambda root: sparsify_at(root, "gpt_neox.layers.3"),
        ("EleutherAI/pythia-70m", "blocks.3.hook_resid_post", 256),
    ),
    (
        "sparsify",
        lambda root: sparsify_at(root, "layers.3.mlp"),
        ("EleutherAI/pythia-70m", "the output of layers.3.mlp", 256),
    ),
    ("sparsify", lambda root: of_sparsify(root / "x" / "mine"), (None, None, None)),
    (
        "Gemma Scope",
        lambda root: of_gemma(root / GEMMA.format("res")),
        ("google/gemma-2-2b", "blocks.20.hook_resid_post", 1024),
    ),
    (
        "Gemma Scope",
        lambda root: of_gemma(root / "gemma-scope-9b-it-mlp" / "layer_9" / "width_16k"),
        ("google/gemma-2-9b-it", "blocks.9.hook_mlp_out", 1024),
    ),
    ("Gemma Scope", lambda root: of_gemma(root / "mine"), (None, None, None)),
    (
        "OpenAI",
        lambda root: of_openai(root / "gpt2-small" / "resid_delta_mlp" / "autoencoders" / "8.pt"),
        ("gpt2", "blocks.8.hook_mlp_out", 64),
    ),
    (
        "OpenAI",
        lambda root: of_openai(root / "x" / "resid_post_attn_v5_32k" / "autoencoders" / "0.pt"),
        (None, "blocks.0.hook_resid_mid", 64),
    ),
    ("OpenAI", lambda root: of_openai(root / "mine.pt"), (None, None, None)),
]


@pytest.mark.parametrize(("library", "make", "says"), PLACES)
def test_where_it_was_made_is_what_path_and_run_say(
    library: str,
    make: Callable[[Path], Path],
    says: tuple[str | None, str | None, int | None],
    tmp_path: Path,
) -> None:
    path = make(tmp_path)
    assert is_known(path)
    found = from_folder(path)
    assert found.source.library == library and found.source.folder == str(path)
    assert (found.facts.model, found.facts.hook_name, found.facts.context_size) == says
    if says[0] == "EleutherAI/pythia-70m":
        assert found.facts.said["dataset_path"] == "me/pile"
        assert found.facts.said["exclude_special_tokens"] == [0]
