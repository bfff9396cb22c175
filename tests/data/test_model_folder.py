"""What lies in a model's folder is read, part of its identity, or said: nothing is passed by."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_here, small_job
from safetensors.torch import load_file, save_file

from tcsae.base.errors import UserError
from tcsae.config import ModelConfig
from tcsae.data.language_model import LanguageModel
from tcsae.data.weights import find_weights

IDS = torch.randint(3, 400, (2, 16), generator=torch.Generator().manual_seed(0))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1000\n"


@pytest.fixture
def folder(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(tiny_gpt2, tmp_path / "model")


def config(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(name="t/m", path=str(folder), **{"dtype": "float32", **changes})


def identity(folder: Path) -> str:
    return find_weights(config(folder)).identity


def refusal(folder: Path) -> str:
    """The line that refuses the folder before anything is loaded."""
    with pytest.raises(UserError) as raised:
        find_weights(config(folder))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def loading(folder: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as raised:
        LanguageModel(config(folder, **changes), 1).activations(IDS)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rewrite(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_weights(folder: Path, **added: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | added, file, {"format": "pt"})


def shard(folder: Path) -> Path:
    """The weights in two files and an index. Returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {}
    for number, part in enumerate((sorted(tensors)[:9], sorted(tensors)[9:]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, {"format": "pt"})
        names |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


# ------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_an_adapter_beside_the_weights_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    line = refusal(folder)
    assert f"holds an adapter ({name})" in line and "merge_and_unload" in line


def test_an_adapter_alone_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(tmp_path)


def test_an_adapter_among_the_weights_is_refused(folder: Path) -> None:
    change_weights(folder, **{"base_model.model.transformer.h.0.lora_A.weight": torch.ones(4, 48)})
    assert "its weights hold base_model.model.transformer.h.0.lora_A.weight" in loading(folder)


# ---------------------------------------------------------- weights without a place, and others


def test_weights_that_the_config_has_no_place_for_are_refused(folder: Path) -> None:
    rewrite(folder / "config.json", n_layer=2)
    line = loading(folder)
    assert "its weights hold transformer.h.2." in line and "and 10 more" in line
    assert "config.json has no place for" in line


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    rewrite(folder / "config.json", n_positions=64)
    line = loading(folder)
    assert "transformer.wpe.weight is (128, 48) in its weights and (64, 48) by config.json" in line


def test_a_head_of_its_own_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(folder, **{"v_head.summary.weight": torch.ones(1, 48)})
    LanguageModel(config(folder), 1).activations(IDS)
    (said,) = caplog.messages
    assert said.startswith("left out: v_head.summary.weight, which GPT2LMHeadModel has no place")


def test_masks_of_old_files_are_no_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(
        folder,
        **{
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        },
    )
    LanguageModel(config(folder), 1).activations(IDS)
    assert caplog.messages == []


def test_two_embeddings_where_the_config_says_one_are_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tied = LanguageModel(config(folder), 1).logits(IDS)
    change_weights(folder, **{"lm_head.weight": torch.zeros_like(
        load_file(folder / "model.safetensors")["transformer.wte.weight"]) + 0.5})  # fmt: skip
    with pytest.raises(AssertionError):
        torch.testing.assert_close(LanguageModel(config(folder), 1).logits(IDS), tied)
    (said,) = caplog.messages
    assert "ties the embeddings" in said and "both are used" in said


@pytest.mark.parametrize("where", ["config", "text_config"])
def test_quantised_weights_are_refused(folder: Path, where: str) -> None:
    said: dict[str, Any] = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    rewrite(folder / "config.json", **(said if where == "config" else {where: said}))
    line = refusal(folder)
    assert "its weights are quantised (gptq)" in line and "dequantise" in line


# ------------------------------------------------------------------------------- identity


def test_an_identity_of_json_and_weights_is_what_it_was(tmp_path: Path) -> None:
    for name, text in [("config.json", '{"a": 1}'), ("vocab.json", "{}"), ("b.json", "3")]:
        (tmp_path / name).write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    # As before other files were in it: stores that were made then go on.
    assert identity(tmp_path) == (
        "sha256:e80b26957af3ef123d4ad19bba1ff798b7621a89e3656886250bd4b1f228fd22"
    )


@pytest.mark.parametrize(
    "name",
    [
        *("merges.txt", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "vocab.bpe"),
        *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "source.spm"),
        *("sentencepiece.bpe.model", "qwen.tiktoken", "tokenization_own.py", "dict.txt"),
    ],
)
def test_every_file_of_a_tokenizer_is_in_the_identity(folder: Path, name: str) -> None:
    before = identity(folder)
    (folder / name).write_text("{}")
    first = identity(folder)
    (folder / name).write_text('{"a": 1}')
    assert len({before, first, identity(folder)}) == 3


def test_what_nobody_reads_is_not(folder: Path) -> None:
    before = identity(folder)
    for name in ("README.md", "LICENSE.txt", "pytorch_model.bin", "training_args.bin", ".x"):
        (folder / name).write_text("something")
    assert identity(folder) == before


# ------------------------------------------------------------------- shards and leftovers


def test_shards_are_read_and_are_the_identity(folder: Path, tiny_gpt2: Path) -> None:
    index = shard(folder)
    expected = LanguageModel(config(tiny_gpt2), 1).activations(IDS)
    assert torch.equal(LanguageModel(config(folder), 1).activations(IDS), expected)
    before = identity(folder)
    first = next(folder.glob("model-00001*"))
    tensors = load_file(first)
    key = sorted(tensors)[0]
    save_file(tensors | {key: tensors[key] + 1}, first, {"format": "pt"})
    assert identity(folder) != before
    assert index.is_file()


@pytest.mark.parametrize(
    "name",
    [
        *("weights.bin", "../other.safetensors", "/etc/other.safetensors", "a/b.safetensors"),
        *("..", "", 7, None, "a\\b.safetensors", "x\x1b[2J.bin"),
    ],
)
def test_an_index_names_safetensors_of_its_folder_only(folder: Path, name: Any) -> None:
    index = shard(folder)
    names = json.loads(index.read_text())["weight_map"]
    rewrite(index, weight_map=names | {next(iter(names)): name})
    (folder.parent / "other.safetensors").write_bytes(b"never opened")
    line = refusal(folder)
    assert "as weights: only *.safetensors files in the same folder" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', '{"weight_map": {}}', "{}"])
def test_an_index_of_another_form_is_refused(folder: Path, content: str) -> None:
    shard(folder).write_text(content)
    assert "has no weight_map" in refusal(folder)


def test_a_shard_that_is_not_there_is_named(folder: Path) -> None:
    shard(folder)
    next(folder.glob("model-00002*")).unlink()
    line = refusal(folder)
    assert "lacks 'model-00002-of-00002.safetensors'" in line and "download it again" in line


def test_weights_that_the_config_names_are_held_to_the_same(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    rewrite(folder / "config.json", transformers_weights="own.safetensors")
    LanguageModel(config(folder), 1).activations(IDS)
    rewrite(folder / "config.json", transformers_weights="../own.safetensors")
    assert "names '../own.safetensors' as weights" in refusal(folder)


def test_links_out_of_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    expected = identity(folder)
    links = tmp_path / "snapshot"
    links.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, blob)
        os.symlink(blob, links / file.name)
    assert identity(links) == expected
    assert LanguageModel(config(links), 1).activations(IDS).shape == (2, 16, 48)


def test_leftovers_are_said_and_are_no_part_of_the_model(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard(folder)
    before = identity(folder)
    assert caplog.messages == []
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"of another download")
    assert identity(folder) == before
    (said,) = caplog.messages
    assert "model-00003-of-00003.safetensors not read" in said


def test_weights_of_another_name_are_said_not_to_be_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    assert "own.safetensors is not read under this name" in refusal(folder)


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("content", ["[]", "null", "3", DEEP, '{"version": '])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_of_another_form_end_in_one_line(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    assert str(folder) in loading(folder)


@pytest.mark.parametrize(
    "changes",
    [
        *({"n_head": 0}, {"n_head": 5}, {"n_positions": "x"}, {"model_type": "own"}),
        *({"model_type": ["own"]}, {"auto_map": 3}, {"auto_map": {}, "model_type": ["own"]}),
        *({"activation_function": "none"}, {"text_config": 3}, {"add_cross_attention": True}),
    ],
)
def test_configs_of_no_model_end_in_one_line(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder / "config.json", **changes)
    assert str(folder) in loading(folder)


def test_a_tokenizer_that_starts_beyond_the_vocabulary_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")  # <|endoftext|> is added to it then
    assert "token 400 is beyond the 400 of t/m" in loading(folder)


# ---------------------------------------------------------------------- pointers and code


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"]
)
def test_pointers_of_git_lfs_are_called_so(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    line = refusal(folder)
    assert f"{name} is a pointer of git-lfs" in line and "`git lfs pull` in" in line


def test_a_pointer_in_place_of_a_shard_or_an_index_is_called_so(folder: Path) -> None:
    index = shard(folder)
    first = next(folder.glob("model-00001*"))
    first.write_text(POINTER)
    assert f"{first} is a pointer of git-lfs" in refusal(folder)
    index.write_text(POINTER)
    assert f"{index} is a pointer of git-lfs" in refusal(folder)


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast
class Own(GPT2Config):
    model_type = "own"
class OwnModel(GPT2LMHeadModel):
    config_class = Own
class OwnTokenizer(GPT2TokenizerFast):
    pass
"""


def with_code(folder: Path, **changes: Any) -> None:
    (folder / "own.py").write_text(CODE)
    map_ = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    rewrite(folder / "config.json", auto_map=map_, **changes)


def no_question(prompt: str = "") -> str:
    raise AssertionError(f"it asked: {prompt}")


@pytest.mark.parametrize("untrained", [False, True])
def test_code_of_an_unknown_model_is_never_run(
    folder: Path, untrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", no_question)
    with_code(folder, model_type="own")
    line = loading(folder, untrained=untrained)
    assert "no model_type 'own'" in line and "is never run" in line
    assert not list(folder.rglob("ran"))


def test_a_model_that_transformers_has_is_its_own_whatever_code_lies_there(
    folder: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", no_question)
    with_code(folder)
    expected = LanguageModel(config(tiny_gpt2), 1).activations(IDS)
    assert torch.equal(LanguageModel(config(folder), 1).activations(IDS), expected)
    assert not list(folder.rglob("ran"))


def test_code_of_a_tokenizer_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", no_question)
    (folder / "own.py").write_text(CODE)
    rewrite(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    )
    line = refusal(folder)
    assert "no tokenizer_class 'OwnTokenizer'" in line and "is never run" in line
    assert not list(folder.rglob("ran"))


def test_a_run_ends_in_one_line_before_anything_is_packed(
    folder: Path, texts: Path, tmp_path: Path, own_store: Path
) -> None:
    (folder / "model.safetensors").write_text(POINTER)
    line = run_here(*small_job(folder, texts, tmp_path / "run", layer="1")).refusal()
    assert "git lfs pull" in line
    assert not own_store.exists()
