"""Sparse autoencoders: one file an architecture, found by name through the registry."""

from __future__ import annotations

from tcsae.config.sae import architectures, config_class
from tcsae.sae.registry import sae_class

__all__ = ["architectures", "config_class", "sae_class"]
