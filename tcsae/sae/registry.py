"""The class of every architecture. Their options, and the list of names, are in config/sae.py."""

from __future__ import annotations

from tcsae.config.sae import config_class
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.batchtopk import BatchTopKSAE
from tcsae.sae.gated import GatedSAE
from tcsae.sae.jumprelu import JumpReLUSAE
from tcsae.sae.matryoshka import MatryoshkaSAE
from tcsae.sae.p_anneal import PAnnealSAE
from tcsae.sae.persistent import PersistentSAE
from tcsae.sae.standard import StandardSAE
from tcsae.sae.tfa import TFASAE
from tcsae.sae.topk import TopKSAE
from tcsae.sae.tsae import TSAE

_CLASSES: dict[type, type[SparseAutoencoder]] = {
    kind.config_class: kind
    for kind in (
        StandardSAE,
        TopKSAE,
        PAnnealSAE,
        BatchTopKSAE,
        JumpReLUSAE,
        GatedSAE,
        MatryoshkaSAE,
        TSAE,
        PersistentSAE,
        TFASAE,
    )
}


def sae_class(name: str) -> type[SparseAutoencoder]:
    """The class of architecture `name`; ValueError with the choices if there is none."""
    return _CLASSES[config_class(name)]
