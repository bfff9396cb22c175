"""Any number as an option of the config groups window, lambda and layer.

Hydra 1.3 takes only names of files as options of a group and refuses numbers outright ("Config
group override must be a string or a list. Got int"). Two pieces make `window=12` and
`lambda=1e-3` work, on the command line, in sweeps and in jobs sent elsewhere:

* `NumberSource` answers, for every finite number, with a config that sets the key of that name;
* `Overrides.__init__` is wrapped so that a number given to a group reaches Hydra as its text.

The second touches a private class: hydra-core is pinned to 1.3.x, and `install` fails loudly when
that class is no longer what it was.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

GROUPS = ("layer", "window", "lambda")


def parse_number(text: str) -> int | float | None:
    """The finite number that `text` writes, or None."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return None


class NumberSource(ConfigSource):
    """Config source `number://GROUP,GROUP`: option `GROUP/NUMBER` sets the global key GROUP."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.groups = frozenset(self.path.split(","))

    @staticmethod
    def scheme() -> str:
        return "number"

    def available(self) -> bool:
        return True

    def _number(self, config_path: str) -> tuple[str, int | float | None]:
        group, _, option = config_path.removesuffix(".yaml").partition("/")
        return group, parse_number(option) if group in self.groups else None

    def is_group(self, config_path: str) -> bool:
        return config_path in self.groups

    def is_config(self, config_path: str) -> bool:
        return self._number(config_path)[1] is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []

    def load_config(self, config_path: str) -> ConfigResult:
        group, value = self._number(config_path)
        if value is None:
            raise ConfigLoadError(f"{config_path} is not a number option")
        return ConfigResult(
            provider=self.provider,
            path=f"{self.scheme()}://{self.path}",
            config=OmegaConf.create({group: value}),
            header={"package": "_global_"},
        )


class NumberPath(SearchPathPlugin):
    """Puts the source on the search path, whatever `hydra.searchpath` and the primary config are:
    a user's own may hold more folders, or be based on train.yaml."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("tcsae", f"{NumberSource.scheme()}://{','.join(GROUPS)}")


def _as_option(override: Override) -> None:
    """Turn a number or a boolean given to a group into its text, as the user wrote it."""
    value = override._value
    if value is None or isinstance(value, (bool, int, float)):
        written = (override.input_line or "").partition("=")[2].strip()
        override._value = written or repr(value)
    elif isinstance(value, QuotedString):
        override._value = value.text


def install() -> None:
    """Register the source and wrap Hydra's overrides; calling it again does nothing."""
    from hydra._internal import defaults_list

    overrides = getattr(defaults_list, "Overrides", None)
    if overrides is None:
        raise HydraException("tcsae needs hydra-core 1.3.x: hydra's Overrides class has moved")
    if getattr(overrides, "_tcsae_numbers", False):
        return
    original = overrides.__init__

    @functools.wraps(original)
    def wrapped(self: Any, repo: Any, overrides_list: list[Override]) -> None:
        for override in overrides_list:
            if not override.is_sweep_override() and repo.group_exists(override.key_or_group):
                _as_option(override)
        original(self, repo, overrides_list)

    overrides.__init__ = wrapped
    overrides._tcsae_numbers = True
    for plugin in (NumberSource, NumberPath):
        Plugins.instance().register(plugin)
