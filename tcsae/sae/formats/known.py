"""The formats of SAEs that are read, and which of them a path is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats import dictionary_learning, gemma_scope, openai, saelens, sparsify
from tcsae.sae.formats.saelens_cfg import CFG_NAME


class LoadedSAE(NamedTuple):
    """An SAE of any format, on raw activations, float32, on the CPU."""

    sae: SparseAutoencoder
    cfg: dict[str, Any]
    """The content of its own JSON file; {} if the format has none."""
    weights: Path
    library: str
    architecture: str
    """By the source's own word."""


class _Format(NamedTuple):
    library: str
    find: Callable[[Path], Path | None]
    """The file of weights that a path (a folder, or a file in it) means in this format."""
    load: Callable[[Path], tuple[SparseAutoencoder, dict[str, Any]]]
    architecture: Callable[[dict[str, Any]], Any]


def _saelens_weights(path: Path) -> Path | None:
    if path.is_file():
        path = path.parent if path.name in (CFG_NAME, saelens.WEIGHTS_NAME) else path
    return path / saelens.WEIGHTS_NAME if (path / saelens.WEIGHTS_NAME).is_file() else None


_FORMATS = (
    _Format(
        "SAELens",
        _saelens_weights,
        lambda weights: saelens.load_saelens(weights.parent),
        lambda cfg: cfg.get("architecture"),
    ),
    _Format(
        "dictionary_learning",
        dictionary_learning.find_ae,
        dictionary_learning.load_dictionary_learning,
        lambda config: config["trainer"]["dict_class"],
    ),
    _Format("sparsify", sparsify.find_weights, sparsify.load_sparsify, lambda cfg: "topk"),
    _Format(
        "Gemma Scope",
        gemma_scope.find_weights,
        gemma_scope.load_gemma_scope,
        lambda cfg: "JumpReLU",
    ),
    _Format("OpenAI", openai.find_weights, openai.load_openai, lambda cfg: cfg["activation"]),
)


_LOOKED_FOR = (
    f"{CFG_NAME} (SAELens, sparsify), {dictionary_learning.AE_NAME} (dictionary_learning) or "
    f"{gemma_scope.WEIGHTS_NAME} (Gemma Scope)"
)


def is_known(path: Path) -> bool:
    """Whether `path` has the files of one of the formats. Nothing is read."""
    try:
        return (path / CFG_NAME).is_file() or any(known.find(path) for known in _FORMATS)
    except ValueError:  # there are several
        return True


def load_known(path: Path) -> LoadedSAE:
    """The SAE that `path` means: a folder, or a file of weights in it.

    Raises ValueError, in one line that names the path, for what is in none of the formats.
    """
    for known in _FORMATS:
        weights = known.find(path)
        if weights is not None:
            sae, cfg = known.load(weights)
            _check_values(sae, path)
            return LoadedSAE(sae, cfg, weights, known.library, str(known.architecture(cfg)))
    if path.is_file():
        raise ValueError(f"{path} is no file of an SAE's weights that is read here")
    if path.is_dir() and not (path / CFG_NAME).is_file():
        raise ValueError(f"cannot load the SAE in {path}: it has no {_LOOKED_FOR}{_below(path)}")
    # It says what the folder lacks.
    saelens.load_saelens(path)
    raise AssertionError("load_saelens read a folder without weights")


def _below(path: Path) -> str:
    """Where SAEs are in the folder's own folders, and its files of OpenAI's, in words."""
    found = [p.name for p in sorted(path.iterdir()) if p.suffix == ".pt" or is_known(p)]
    more = f" ... ({len(found)})" if len(found) > 3 else ""
    return (
        f"; there are SAEs in it, give one of them: {', '.join(found[:3])}{more}" if found else ""
    )


def _check_values(sae: SparseAutoencoder, path: Path) -> None:
    """Raises ValueError for weights that no training leaves whole: all that is measured of them
    would be NaN. A threshold may be infinite: such a feature never fires."""
    for name, tensor in sae.saelens_state().tensors.items():
        broken = tensor.isnan() if name == "threshold" else ~tensor.isfinite()
        if n := int(broken.sum()):
            raise ValueError(
                f"cannot load the SAE in {path}: {name} has {n:,} values that are no finite "
                "numbers: its training diverged, or the file is damaged"
            )
