"""What an SAE from elsewhere was made for, against what it is measured on: one sentence each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tcsae.jobs.cautions import ROWS, Here, differences
from tcsae.jobs.facts import RUNNER_NAME, UNKNOWN, Facts, dictionary_learning_facts
from tcsae.jobs.foreign import from_folder

HERE = Here("gpt2", "blocks.1.hook_resid_pre", 16, ("me/books", "books"), "float32", frozenset({7}))
SAME: dict[str, Any] = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.1.hook_resid_pre",
    "model_class_name": "HookedTransformer",
    "model_from_pretrained_kwargs": {
        "center_writing_weights": False,
        "dtype": "torch.float32",
        "n_devices": 2,
    },
    "autocast_lm": False,
    "dtype": "float32",
    "prepend_bos": True,
    "exclude_special_tokens": [7],
    "seqpos_slice": [None],
    "context_size": 16,
    "use_chat_formatting": False,
    "disable_concat_sequences": False,
    "sequence_separator_token": "bos",
    "dataset_path": "books",
    "training_architecture": "batchtopk",
    "sae_lens_version": "6.54.9",
}


def test_what_is_the_same_is_not_said() -> None:
    assert differences(SAME, HERE) == []
    others = {
        "model_name": "openai-community/gpt2",
        "model_class_name": "AutoModelForCausalLM",
        "exclude_special_tokens": True,
        # Position 0 is not measured.
        "seqpos_slice": [1, None],
        "sequence_separator_token": 7,
        "dataset_path": "Me/Books",
        "sae_lens_version": "7.0.0",
    }
    assert differences(SAME | others, HERE) == []
    # What a folder does not say is no difference.
    assert differences({}, HERE) == []
    assert differences(dict.fromkeys(row.key for row in ROWS), HERE) == []


DIFFERENT: list[tuple[dict[str, Any], str]] = [
    ({"model_name": "gpt2-medium"}, "made for the model gpt2-medium and is measured on gpt2."),
    ({"model_name": "you/gpt2-small"}, "made for the model you/gpt2-small"),
    ({"hook_name": "blocks.2.hook_resid_pre"}, "made for blocks.2.hook_resid_pre and is measured"),
    ({"model_class_name": "HookedMamba"}, "taken by HookedMamba"),
    (
        {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
        "processed (center_writing_weights=True); here the model is as it was published: the "
        "results may be below",
    ),
    ({"model_from_pretrained_kwargs": {"fold_ln": True}}, "(fold_ln=True); here the model is as "),
    ({"model_from_pretrained_kwargs": {"fold_ln": True}}, "as they are, up to rounding"),
    ({"model_from_pretrained_kwargs": {"new": 3}}, "(new=3); here the model is as it was publish"),
    ({"model_from_pretrained_kwargs": {"torch_dtype": "bfloat16"}}, "in bfloat16; here the model "),
    ({"autocast_lm": True}, "mixed precision (autocast_lm); here the model runs in float32"),
    (
        {"dtype": "torch.bfloat16"},
        "computed in bfloat16 where it was made (dtype); here in float32",
    ),
    ({"prepend_bos": False}, "without a leading BOS (prepend_bos=False)"),
    ({"exclude_special_tokens": [7, 9]}, "not trained on the tokens [9]"),
    ({"seqpos_slice": [5, -5]}, "on the positions 5 to 10 of contexts of 16 tokens"),
    ({"seqpos_slice": [0, None, 2]}, "on the positions 0 to 14, every 2th of contexts"),
    ({"seqpos_slice": ["a", {}]}, "on the positions ['a', {}] (seqpos_slice)"),
    ({"context_size": 8}, "contexts of 8 tokens and is measured on contexts of 16, with positions"),
    ({"context_size": 128}, "contexts of 128 tokens and is measured on contexts of 16, shorter"),
    ({"use_chat_formatting": True}, "chat format"),
    ({"disable_concat_sequences": True}, "one document each (disable_concat_sequences)"),
    ({"sequence_separator_token": "eos"}, "parted by eos (sequence_separator_token)"),
    ({"dataset_path": "monology/pile"}, "on text of monology/pile and is measured on books"),
    ({"sae_lens_version": "6.54.8"}, "is a BatchTopK one, saved by SAELens 6.54.8: before 6.54.9"),
    ({"sae_lens_version": None}, "a SAELens that it does not name"),
]


@pytest.mark.parametrize(("change", "says"), DIFFERENT, ids=[str(c[0])[:50] for c in DIFFERENT])
def test_every_difference_is_one_sentence(change: dict[str, Any], says: str) -> None:
    said = differences(SAME | change, HERE)
    assert len(said) == 1 and says in said[0], said
    assert said[0].startswith("The SAE ") and said[0].endswith(".")


def test_every_fact_has_a_case_where_it_differs() -> None:
    shown = {key for change, _ in DIFFERENT for key in change} | {"training_architecture"}
    elsewhere = {row.key for row in ROWS if " " in row.key}  # of the folders below
    assert {row.key for row in ROWS} - shown == elsewhere


@pytest.mark.parametrize(
    "change",
    [
        {"rescale_acts_by_decoder_norm": False},
        {"training_architecture": "jumprelu"},
        {"normalize_activations in training": "none"},
        {"sae_lens_training_version": "6.60.0"},
    ],
)
def test_a_threshold_that_was_saved_right_is_not_doubted(change: dict[str, Any]) -> None:
    assert differences(SAME | {"sae_lens_version": "6.54.8"} | change, HERE) == []


@pytest.mark.parametrize("strange", [3, "x" * 500 + "\nnewline", [["?"]], {"a": {"b": 1}}, 1.5, -1])
def test_what_a_file_says_may_be_of_any_type_and_length(strange: Any) -> None:
    said = differences({row.key: strange for row in ROWS if row.key != UNKNOWN}, HERE)
    assert all(len(text) < 600 and "\n" not in text for text in said)


# ---------------------------------------------------------------- of which folders


def folder_of(folder: Path, cfg: dict[str, Any], threshold: torch.Tensor | None = None) -> Facts:
    folder.mkdir()
    tensors = {"W_enc": torch.ones(4, 6), "W_dec": torch.ones(6, 4)}
    tensors |= {"b_enc": torch.zeros(6), "b_dec": torch.zeros(4)}
    if threshold is not None:
        tensors["threshold"] = threshold
    save_file(tensors, folder / "sae_weights.safetensors")
    shape = {"d_in": 4, "d_sae": 6, "dtype": "float32"}
    (folder / "cfg.json").write_text(json.dumps(shape | cfg))
    return from_folder(folder).facts


def test_an_old_folder_may_have_been_made_for_processed_weights(tmp_path: Path) -> None:
    old = {"architecture": "standard", "hook_name": HERE.hook_name, "model_name": "gpt2"}
    said = differences(folder_of(tmp_path / "a", old).said, HERE)
    assert len(said) == 1 and "does not say how the model's weights were processed" in said[0]
    told = {"model_from_pretrained_kwargs": {}}
    for n, more in enumerate((told, {"sae_lens_version": "3.19.2"}, {"sae_lens_version": "5.1.0"})):
        assert differences(folder_of(tmp_path / str(n), old | more).said, HERE) == []


def test_one_threshold_for_all_is_a_batchtopk(tmp_path: Path) -> None:
    cfg = {"architecture": "jumprelu", "metadata": {"sae_lens_version": "6.20.0"}}
    one = folder_of(tmp_path / "one", cfg, torch.full((6,), 0.3))
    (said,) = differences(one.said, HERE)
    assert "has one threshold for all features, as a BatchTopK one, saved by SAELens 6.20.0" in said
    many = folder_of(tmp_path / "many", cfg, torch.arange(6.0))
    assert differences(many.said, HERE) == []


def test_what_the_runner_was_told_counts_where_the_sae_does_not_say(tmp_path: Path) -> None:
    cfg = {"architecture": "standard", "metadata": {"prepend_bos": True}}
    facts = folder_of(tmp_path / "sae", cfg)
    assert differences(facts.said, HERE) == []
    runner = {
        "autocast_lm": True,
        "prepend_bos": False,
        "sae": {"normalize_activations": "layer_norm"},
    }
    (tmp_path / "sae" / RUNNER_NAME).write_text(json.dumps(runner))
    said = differences(from_folder(tmp_path / "sae").facts.said, HERE)
    assert [("autocast_lm" in s, "layer_norm" in s) for s in said] == [(True, False), (False, True)]
    for broken in ("[1]", "{", '{"sae": 3}'):
        (tmp_path / "sae" / RUNNER_NAME).write_text(broken)
        assert differences(from_folder(tmp_path / "sae").facts.said, HERE) == []


def test_a_block_of_transformers_own_model_is_its_residual_stream(tmp_path: Path) -> None:
    said = {"model_class_name": "AutoModelForCausalLM", "hook_name": "model.layers.12"}
    facts = folder_of(tmp_path / "a", {"architecture": "standard", "metadata": said})
    assert facts.hook_name == "blocks.12.hook_resid_post" == facts.said["hook_name"]
    part = folder_of(
        tmp_path / "b",
        {"architecture": "standard", "metadata": said | {"hook_name": "model.layers.12.mlp"}},
    )
    assert part.hook_name == "model.layers.12.mlp"


def test_dictionary_learnings_words_are_understood() -> None:
    trainer = {"lm_name": "gpt2", "layer": 1, "submodule_name": "resid_pre_layer_1"}
    facts = dictionary_learning_facts({"trainer": trainer, "buffer": {"ctx_len": 16}})
    assert (facts.model, facts.hook_name, facts.context_size) == ("gpt2", HERE.hook_name, 16)
    assert differences(facts.said, HERE) == []
    more = trainer | {"use_gelu": True, "lr": 3, "wandb_name": "x"}
    (said,) = differences(dictionary_learning_facts({"trainer": more}).said, HERE)
    assert "not known here (use_gelu=True)" in said and said.endswith("computed as another.")
    inside = dictionary_learning_facts({"trainer": trainer, "buffer": {"io": "in"}})
    assert inside.hook_name == "the input of blocks.1.hook_resid_pre"
    other = dictionary_learning_facts({"trainer": {"submodule_name": "mlp"}, "buffer": {}})
    assert (other.model, other.hook_name, other.context_size) == (None, None, None)
