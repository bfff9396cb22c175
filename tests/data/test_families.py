"""Many families of models, at every hook of the config: one network, or one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import tiny_tokenizer

from tcsae.base.errors import UserError
from tcsae.config import ModelConfig
from tcsae.data.language_model import LanguageModel

HOOKS = ("resid_pre", "resid_post", "mlp_out", "attn_out")
IDS = torch.randint(3, 400, (2, 16), generator=torch.Generator().manual_seed(0))
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
USUAL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    **{"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
}
GROUPED = {**USUAL, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 unscaled": ("GPT2Config", {**OLD, "scale_attn_weights": False}),
    "gptj": ("GPTJConfig", {**OLD, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", USUAL),
    "openai-gpt": ("OpenAIGPTConfig", OLD),  # whose blocks give lists
    # Whose MLP sees all tokens in one row.
    "opt": ("OPTConfig", {**USUAL, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", FALCON),
    "falcon alibi": (
        "FalconConfig",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**GROUPED, **EXPERTS, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", USUAL),
    "olmo2": ("Olmo2Config", USUAL),
    "cohere": ("CohereConfig", GROUPED),
    "cohere2": ("Cohere2Config", {**GROUPED, "sliding_window": 8}),
    "granite": ("GraniteConfig", {**GROUPED, "residual_multiplier": 0.3}),
    "deepseek_v3": ("DeepseekV3Config", {**USUAL, **LATENT}),
    "glm4": ("Glm4Config", {**GROUPED, "head_dim": 8}),
    "gpt_oss": (
        "GptOssConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**USUAL, "lru_width": 32, "attention_window_size": 8},
    ),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "rwkv": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2}),
}
WITHOUT_PARTS = {"recurrent_gemma", "mamba", "rwkv"}
WITHOUT_PAST = {"openai-gpt", "recurrent_gemma", "mamba", "rwkv"}
"""Which keep no keys and values of a text that is gone on with."""
OTHER_IN_TRANSFORMER_LENS = {"gpt2 unscaled", "falcon alibi", "cohere", "cohere2", "deepseek_v3"}
"""Which its bridge, of the version the tests have, computes otherwise than transformers."""

Make = Callable[[str, dict[str, Any]], Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(kind: str, settings: dict[str, Any]) -> Path:
        transformers.utils.logging.disable_progress_bar()
        tokenizer = tiny_tokenizer()
        config = getattr(transformers, kind)(vocab_size=len(tokenizer), **SPECIAL, **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "embed" not in name and "wte" not in name:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


def at_hook(folder: Path, hook: Any, layer: int = 1, **changes: Any) -> LanguageModel:
    config = ModelConfig(name="t/m", path=str(folder), **{"dtype": "float32", **changes}, hook=hook)
    return LanguageModel(config, layer)


def refusal(model: LanguageModel) -> str:
    with pytest.raises(UserError) as raised:
        model.activations(IDS)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def check_repeated(model: LanguageModel, clean: torch.Tensor, zeros: torch.Tensor) -> None:
    """What comes before the hook is run once, and nothing else changes by it."""
    ran: list[int] = []
    network = model._network
    blocks = network._before
    assert len(blocks) == (2 if model.cfg.hook == "resid_post" else 1)
    watched = [next(m for m in block.modules() if not [*m.children()]) for block in blocks]
    handles = [
        m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in enumerate(watched)
    ]
    with torch.inference_mode(), model.repeated(IDS) as logits:
        assert torch.equal(logits(), clean)
        once = len(ran)
        assert torch.equal(logits(torch.zeros_like), zeros) and torch.equal(logits(), clean)
        assert len(ran) == once > 0
    assert torch.equal(model.logits(IDS), clean) and len(ran) == 2 * once
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_harvested_is_what_is_replaced_at_every_hook(
    family: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(*FAMILIES[family])
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = own(IDS, use_cache=False).logits
    for hook in HOOKS:
        model = at_hook(folder, hook)
        if family in WITHOUT_PARTS and not hook.startswith("resid"):
            line = refusal(model)
            assert f"model.hook = {hook}: block 1 of" in line
            assert line.endswith("has no such part; it has resid_pre, resid_post")
            continue
        x_BTD, seen = model.activations(IDS), []
        assert x_BTD.shape == (2, 16, 32)

        def same(x: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(x.clone())
            return x.clone()

        clean = model.logits(IDS)
        torch.testing.assert_close(clean, expected, rtol=1e-5, atol=1e-5)
        # A number before and after (Granite) rounds once.
        torch.testing.assert_close(model.logits(IDS, same), clean, rtol=1e-6, atol=1e-6)
        assert torch.equal(seen[0], x_BTD), hook
        zeros = model.logits(IDS, torch.zeros_like)
        assert (zeros - clean).abs().max() > 1e-2, hook
        check_repeated(model, clean, zeros)
        assert model.checks is not None and model.checks["later_tokens_change"] == 0
    warned = any("TransformerLens computes t/m otherwise" in m for m in caplog.messages)
    assert warned == (family in OTHER_IN_TRANSFORMER_LENS)


@pytest.mark.parametrize("hook", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_grows_is_the_whole_text(family: str, hook: str, make: Make) -> None:
    """With keys and values kept where the family can, and without where it cannot: steering."""
    model = at_hook(make(*FAMILIES[family]), hook)
    ids = IDS[:1]
    change = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    whole = model.logits(ids, lambda x: x + change)
    growing, first, ran = model.growing(), 0, []
    for more in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
        stop = first + more.shape[1]

        def replace(at: int, stop: int = stop) -> Callable[[torch.Tensor], torch.Tensor]:
            ran.append(stop - at)
            return lambda x: x + change[at:stop]

        last = growing.logits(more, replace)[:, -1]
        spread = float(whole[:, stop - 1].std())
        torch.testing.assert_close(last, whole[:, stop - 1], rtol=0, atol=2e-3 * spread)
        first = stop
    assert ran == ([*range(5, 17)] if family in WITHOUT_PAST else [5, *[1] * 11])


def test_granites_parts_are_what_joins_the_residual_stream(make: Make) -> None:
    folder = make(*FAMILIES["granite"])
    pre, attention, mlp, post = (
        at_hook(folder, hook).activations(IDS)
        for hook in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    )
    torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("untrained", [False, True])
def test_an_encoder_is_no_causal_model(dtype: str, untrained: bool, make: Make) -> None:
    model = at_hook(make("BertConfig", USUAL), "resid_post", dtype=dtype, untrained=untrained)
    assert "t/m is no causal language model: other tokens after a position" in refusal(model)
    assert model.checks is None


def test_a_decoder_that_is_set_to_see_both_ways_is_none_either(make: Make) -> None:
    kind, settings = FAMILIES["gemma3"]
    model = at_hook(make(kind, {**settings, "use_bidirectional_attention": True}), "resid_post")
    assert "is no causal language model" in refusal(model)


def test_an_encoders_architecture_as_a_decoder_is_one(make: Make) -> None:
    model = at_hook(make("BertConfig", {**USUAL, "is_decoder": True}), "attn_out")
    model.activations(IDS)
    assert model.checks is not None and model.checks["later_tokens_change"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "gemma3", "mamba", "gpt_oss"])
def test_a_causal_one_is_in_either_precision(family: str, dtype: str, make: Make) -> None:
    model = at_hook(make(*FAMILIES[family]), "resid_post", layer=0, dtype=dtype)
    model.activations(IDS)
    assert model.checks is not None and model.checks["later_tokens_change"] < 1e-3


def test_a_family_that_transformer_lens_does_not_know_is_refused(make: Make) -> None:
    line = refusal(at_hook(make("CTRLConfig", {**OLD, "dff": 64}), "resid_post"))
    assert "has no map of ctrl" in line and "another family" in line


def test_weights_that_give_no_numbers_are_refused(make: Make) -> None:
    from safetensors.torch import load_file, save_file

    folder = make("GPT2Config", OLD)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "logits that are not finite in float32" in refusal(at_hook(folder, "resid_post"))


def test_what_does_not_come_as_one_vector_for_each_token_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("GPT2Config", OLD)
    block = transformers.models.gpt2.modeling_gpt2.GPT2MLP
    inner = block.forward
    # As of models whose blocks give dictionaries: nothing at the hook is a tensor.
    monkeypatch.setattr(block, "forward", lambda self, x: _Held(inner(self, x)))
    assert "is not one vector of 32 numbers" in refusal(at_hook(folder, "mlp_out"))


class _Held:
    """A tensor with something around it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __radd__(self, other: torch.Tensor) -> torch.Tensor:
        return other + self.tensor


def test_nothing_is_warned_of_where_the_networks_agree(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = at_hook(tiny_llama, "attn_out")
    with caplog.at_level(logging.WARNING):
        model.activations(IDS)
    assert caplog.messages == []
    assert model.checks is not None and model.checks["network"] == "transformers"
    assert 0 <= model.checks["transformer_lens"]["activations"] < 1e-5
