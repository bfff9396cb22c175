"""What lies at the local paths of a config: whether a finished run is still of it."""

from __future__ import annotations

from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.config import DatasetConfig, Measured, ModelConfig


def text_identity(cfg: DatasetConfig) -> str | None:
    """Of local files, by their content; None for text that a name and a revision fix."""
    if cfg.source != "files":
        return None
    from tcsae.data.corpora import open_corpus

    return open_corpus(cfg).fingerprint()


def _weights_identity(cfg: ModelConfig) -> str | None:
    if cfg.path is None:
        return None
    from tcsae.data.weights import find_weights

    return find_weights(cfg).identity


class Sources:
    """What is at the paths of configs now; each is read once, however many jobs share it."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, str | None]] = {}

    def now(self, config: Measured) -> dict[str, str | None]:
        key = config.model.model_dump_json() + config.dataset.model_dump_json()
        if key not in self._known:
            self._known[key] = {
                "text": text_identity(config.dataset),
                "weights": _weights_identity(config.model),
            }
        return self._known[key]

    def check(self, config: Measured, folder: Path, content: Path) -> None:
        """Raises UserError for a finished run whose text or weights have been replaced since it was
        made. What is no longer there, or was not noted then, changes nothing."""
        if not content.is_file():
            return
        before = read_json(content)
        try:
            now = self.now(config)
        except UserError:
            return
        paths = {
            "text": f"dataset.path={config.dataset.path}",
            "weights": f"model.path={config.model.path}",
        }
        changed = [
            path
            for name, path in paths.items()
            if now[name] is not None and before.get(name) not in (None, now[name])
        ]
        if changed:
            raise UserError(
                f"{folder} is finished, but of what was there before: {' and '.join(changed)} has "
                "changed since. rerun=true repeats it with what is there now; another folder "
                "(hydra.run.dir, hydra.sweep.dir) leaves it as it is"
            )
