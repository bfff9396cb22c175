"""Architecture names and where their classes live. Free of torch, so that --help stays quick.

A further architecture is one file in this folder and one line in `_CLASSES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tcsae.sae.base import SAEConfig, SparseAutoencoder

_CLASSES = {
    "standard": "tcsae.sae.standard:StandardSAE",
    "topk": "tcsae.sae.topk:TopKSAE",
    "p_anneal": "tcsae.sae.p_anneal:PAnnealSAE",
    "batchtopk": "tcsae.sae.batchtopk:BatchTopKSAE",
    "jumprelu": "tcsae.sae.jumprelu:JumpReLUSAE",
    "gated": "tcsae.sae.gated:GatedSAE",
    "matryoshka": "tcsae.sae.matryoshka:MatryoshkaSAE",
    "tsae": "tcsae.sae.tsae:TSAE",
    "persistent": "tcsae.sae.persistent:PersistentSAE",
    "tfa": "tcsae.sae.tfa:TFASAE",
}


def architectures() -> list[str]:
    """The known architecture names, in the order in which the registry lists them."""
    return list(_CLASSES)


def sae_class(name: str) -> type[SparseAutoencoder]:
    """The class of architecture `name`; ValueError with the choices if there is none."""
    if name not in _CLASSES:
        raise ValueError(f"unknown SAE architecture {name!r}: choose from {', '.join(_CLASSES)}")
    module, _, attribute = _CLASSES[name].partition(":")
    return getattr(import_module(module), attribute)


def config_class(name: str) -> type[SAEConfig]:
    """The configuration class of architecture `name`; ValueError with the choices if unknown."""
    return sae_class(name).config_class
