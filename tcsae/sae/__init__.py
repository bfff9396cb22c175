"""Sparse autoencoders: one file an architecture, found by name through the registry."""

from __future__ import annotations

from tcsae.sae.registry import architectures, config_class, sae_class

__all__ = ["architectures", "config_class", "sae_class"]
