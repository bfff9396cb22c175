"""What a model's folder holds: the files that transformers reads, and what must not be read.

Only these files are the model's identity, by content. What would be read as something else than it
is (an adapter left out, quantised weights, code, pointers of git-lfs) is refused before any of it
is loaded.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from tcsae.base.errors import UserError
from tcsae.base.files import file_digest, read_json, refuse_lfs_pointer

log = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "spm.model"),
)
"""Without any of these transformers makes an empty tokenizer, and says nothing."""

READ = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".spm", ".bpe", ".codes", ".py")
"""What configs and tokenizers are kept in (merges.txt, spiece.model, vocab.bpe, source.spm)."""
_DOCUMENTS = ("readme", "license", "licence", "notice", "requirements")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def check_folder(folder: Path) -> list[Path]:
    """The files of a folder that transformers reads, sorted by name.

    Raises UserError, which says what to do, for a folder whose model would be another than the one
    that its files say.
    """
    refuse_adapters(folder)
    config = _read_config(folder)
    weights = _weight_files(folder, config)
    files = sorted(
        [
            *weights,
            *(f for f in folder.iterdir() if f.is_file() and f.suffix in READ and not _is_text(f)),
        ]
    )
    for file in files:
        refuse_lfs_pointer(file)
    _refuse_code(folder, config)
    _refuse_quantised(folder, config)
    return files


def content_identity(files: list[Path]) -> str:
    """A name for the content of files, with their names."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_digest(file)};".encode())
    return f"sha256:{digest.hexdigest()}"


def say_what_is_not_read(folder: Path, files: list[Path]) -> None:
    """Weights that no index names, left of another model or another download."""
    left = sorted({f.name for f in folder.glob("*.safetensors")} - {f.name for f in files})
    if left:
        log.warning(
            f"{folder}: {', '.join(left[:3])}{' and others' if len(left) > 3 else ''} not read: "
            f"the model is in {WEIGHTS}, or in the files that {INDEX} names"
        )


def _is_text(file: Path) -> bool:
    """Of the files that end like a vocabulary: one for people."""
    return file.suffix == ".txt" and file.name.lower().startswith(_DOCUMENTS)


def refuse_adapters(folder: Path) -> None:
    """Raises UserError where a model is weights and something to be added to them."""
    found = next((name for name in _ADAPTERS if (folder / name).exists()), None)
    if found is not None:
        raise UserError(
            f"{folder} holds an adapter ({found}), which would be left out: merge it into the "
            "weights (peft: model.merge_and_unload().save_pretrained(FOLDER)) and give that "
            "folder, or remove the adapter's files for the base model alone"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no config.json there")
    refuse_lfs_pointer(path)
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is no model's config: it holds no keys")
    return config


def _weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """In the order in which transformers looks for them."""
    named = config.get("transformers_weights")
    if named is not None:
        file = _inside(folder, folder / CONFIG, named, (".safetensors", INDEX))
        return _shards(folder, file) if file.name.endswith(".json") else [file]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder, folder / INDEX)
    found = sorted(f.name for f in folder.glob("*.safetensors"))
    raise UserError(
        f"{folder}: no {WEIGHTS} and no {INDEX} there (pickles are not read)"
        + (f"; {found[0]} is not read under this name" if found else "")
    )


def _shards(folder: Path, index: Path) -> list[Path]:
    refuse_lfs_pointer(index)
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map: download it again")
    values = {value if isinstance(value, str) else repr(value) for value in names.values()}
    return [_inside(folder, index, name, (".safetensors",)) for name in sorted(values)]


def _inside(folder: Path, origin: Path, name: Any, endings: tuple[str, ...]) -> Path:
    """A file of the folder that `origin` names. A link there may lead out, as in the hub's cache.

    Raises UserError.
    """
    is_plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
    if not is_plain or not name.endswith(endings):
        raise UserError(
            f"{origin} names {name!r} as weights: only *.safetensors files in the same folder are "
            "read; save the model anew (save_pretrained)"
        )
    if not (folder / name).is_file():
        raise UserError(f"{folder} lacks {name!r}, which {origin.name} names: download it again")
    return folder / name


def _refuse_code(folder: Path, config: dict[str, Any]) -> None:
    """Where transformers has no class of its own it would ask to run the folder's."""
    never = "and code that lies beside weights (auto_map) is never run"
    if "auto_map" in config:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise UserError(
                f"{folder}: transformers has no model_type {kind!r}, {never}: give a model that "
                "transformers itself has, or update transformers"
            )
    tokenizer = folder / "tokenizer_config.json"
    said = read_json(tokenizer) if tokenizer.is_file() else {}
    code = said.get("auto_map") if isinstance(said, dict) else None
    if isinstance(code, dict) and "AutoTokenizer" in code:
        import transformers

        kind = said.get("tokenizer_class")
        if not isinstance(kind, str) or not hasattr(transformers, kind):
            raise UserError(
                f"{folder}: transformers has no tokenizer_class {kind!r}, {never}: give a model "
                "whose tokenizer transformers itself has, or update transformers"
            )


def _refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    part = config.get("text_config")
    for at in (config, part if isinstance(part, dict) else {}):
        said = at.get("quantization_config")
        if said:
            method = said.get("quant_method", "?") if isinstance(said, dict) else "?"
            raise UserError(
                f"{folder}: its weights are quantised ({method}), which are not read: give the "
                "unquantised ones, or dequantise them (transformers: model.dequantize(), then "
                "save_pretrained)"
            )
