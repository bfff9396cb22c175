"""From the command line through Hydra to the checked Config, and from a value back to a command."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from tcsae.config import Config, number_options, parse
from tcsae.config.arguments import with_model
from tcsae.config.effect import refuse_without_effect
from tcsae.config.folder import conf_folder


def prepare_hydra() -> None:
    """Before anything is composed: any number as an option, and launcher and sweeper of this
    package as Hydra's own defaults. train.yaml does not override them, so that an experiment may:
    of two overrides Hydra takes the outer one without a word."""
    from hydra.conf import HydraConf
    from hydra.core.config_store import ConfigStore

    number_options.install()
    chosen = {"launcher": "here", "sweeper": "grid"}

    def ours(default: dict[str, Any]) -> dict[str, Any]:
        return {group: chosen.get(group, option) for group, option in default.items()}

    node = HydraConf()
    node.defaults = [ours(default) for default in node.defaults]
    ConfigStore.instance().store(group="hydra", name="config", node=node, provider="hydra")


def compose_tree(overrides: list[str]) -> DictConfig:
    """conf/train.yaml with `overrides`, as `python -m tcsae.train` composes it, without Hydra's own
    node. Raises one of Hydra's errors for a key or an option that there is not."""
    from hydra import compose, initialize_config_dir

    prepare_hydra()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("train", with_model(overrides))


def to_config(composed: DictConfig) -> Config:
    """The Config of a composition, Hydra's own node left out. Raises UserError, in one line."""
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    container = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    config = parse(container)  # type: ignore[arg-type]
    refuse_without_effect(config)
    return config


def config_of(*overrides: str) -> Config:
    """The checked Config of a command line. Raises UserError or one of Hydra's errors."""
    return to_config(compose_tree(list(overrides)))


def override_value(value: Any) -> str:
    """A value as Hydra's grammar reads it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{override_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(override_value, value))}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return repr(value)
