"""The shapes of language models and the size of texts, known before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from helpers import small_config, write_texts

from tcsae.base.signals import StopRequest
from tcsae.config import Config, ModelConfig
from tcsae.data.context_cache import load_or_build_contexts
from tcsae.data.language_model import LanguageModel
from tcsae.launch.counted import passes
from tcsae.launch.model_facts import model_facts, text_contexts

# Of the models' cards and configs.
PUBLISHED = {
    "gpt2": 124_439_808,
    "google/gemma-2-2b": 2_614_341_888,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "google/gemma-3-270m": 268_098_176,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_in_the_table_give_the_published_number_of_parameters(name: str) -> None:
    facts = model_facts(ModelConfig(name=name))
    assert facts is not None
    weights = passes(facts.shape, 1, 8, 1, True).weights
    assert weights == 2 * PUBLISHED[name]


def test_a_model_that_is_in_no_table_is_not_known() -> None:
    assert model_facts(ModelConfig(name="somebody/some-model")) is None


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "llama"])
def test_a_folder_tells_the_shape_of_its_model(kind: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(f"tiny_{kind}")
    facts = model_facts(ModelConfig(name="gpt2", path=str(folder)))
    real = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert facts is not None
    assert passes(facts.shape, 1, 8, 1, False).weights == 4 * real


def test_counting_a_models_passes_warns_of_nothing(
    tiny_gpt2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its ids stand for any: that they would be padding is said to nobody."""
    shape = json.loads((tiny_gpt2 / "config.json").read_text()) | {"pad_token_id": 0}
    transformers.utils.logging.warning_once.cache_clear()
    transformers.utils.logging.enable_propagation()
    try:
        passes(json.dumps(shape), 1, 9, None, False)
    finally:
        transformers.utils.logging.disable_propagation()
    assert caplog.messages == []


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", "[]", "{}", '{"hidden_size": 8}', "[" * 100_000),
        '{"model_type": "gpt2", "n_positions": "x"}',
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}',
    ],
)
def test_a_folder_that_is_no_model_is_not_known(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert model_facts(ModelConfig(name="gpt2", path=str(tmp_path))) is None


def test_a_multimodal_model_is_its_text_part(tiny_llama: Path, tmp_path: Path) -> None:
    own = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"text_config": own}))
    of_both = [model_facts(ModelConfig(name="x", path=str(p))) for p in (tiny_llama, tmp_path)]
    assert of_both[0] == of_both[1] is not None


def _config(weights: Path, texts: Path, **changes: str) -> Config:
    return small_config(weights, texts, **changes)


def test_contexts_that_are_asked_for_are_taken_at_their_word(tiny_gpt2: Path, texts: Path) -> None:
    config = _config(tiny_gpt2, texts, dataset__n_contexts="7", dataset__n_eval_contexts="3")
    assert text_contexts(config.dataset) == (7, 3)


def test_all_contexts_of_a_text_are_guessed_from_its_size(tiny_gpt2: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", documents=60, words=300)
    config = _config(tiny_gpt2, texts, dataset__n_contexts="null")
    guess = text_contexts(config.dataset)
    model = LanguageModel(config.model, config.layer)
    real, _ = load_or_build_contexts(config.dataset, model, tmp_path, StopRequest())
    assert guess is not None and guess[1] == config.dataset.n_eval_contexts
    # Four bytes a token is a guess: these words have five letters and a token each.
    assert 0.5 < guess[0] / len(real) < 2


def test_a_text_without_a_known_end_or_none_at_all_is_not_guessed(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    unlimited = _config(tiny_gpt2, texts).dataset.model_copy(update={"n_contexts": None})
    streamed = unlimited.model_copy(update={"source": "hub", "path": "somebody/text"})
    missing = unlimited.model_copy(update={"path": str(tmp_path / "nothing")})
    not_installed = unlimited.model_copy(update={"source": "wheel", "path": "no_such_package"})
    assert [text_contexts(cfg) for cfg in (streamed, missing, not_installed)] == [None] * 3
