"""From what Hydra composed to the checked Config."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from tcsae.config import Config, parse


def to_config(composed: DictConfig) -> Config:
    """The Config of a composition, Hydra's own node left out. Raises UserError, in one line."""
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    container = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return parse(container)  # type: ignore[arg-type]
