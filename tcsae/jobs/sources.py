"""What lies at the local paths of a config: whether a finished run is still of it."""

from __future__ import annotations

from pathlib import Path

from tcsae.base.errors import UserError
from tcsae.base.files import read_json
from tcsae.config import Measured


class Sources:
    """What is at the paths of configs now; each is read once, however many jobs share it."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, str | None]] = {}

    def now(self, config: Measured) -> dict[str, str | None]:
        key = config.model.model_dump_json() + config.dataset.model_dump_json()
        if key not in self._known:
            # Here, because launchers are imported at every start.
            from tcsae.data.corpora import text_identity
            from tcsae.data.weights import find_weights

            local = config.model.path is not None
            self._known[key] = {
                "text": text_identity(config.dataset),
                "weights": find_weights(config.model).identity if local else None,
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
