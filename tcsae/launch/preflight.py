"""What is looked at on the machine that sends jobs, so that hundreds of them do not find it out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tcsae.config import Config

log = logging.getLogger(__name__)


def check_reachable(configs: Sequence[Config]) -> None:
    """Raises UserError, in words that say what to do, for a model or text that jobs could not have.

    Each is asked for once: a gated model without a login, a package that is not installed, a path
    that is not there, a dataset that the hub does not know.
    """
    # Here, as the plan of a sweep and its menu need no torch.
    from tcsae.data.corpora import reach_text
    from tcsae.data.labelled import check_labels
    from tcsae.data.weights import reach_weights

    real = [config for config in configs if config.model.world is None]
    models = {(c.model.name, c.model.path, c.model.package, c.model.revision): c for c in real}
    for config in models.values():
        if config.model.is_given:
            continue
        reach_weights(config.model)
    texts = {
        (d.source, d.path, d.subset, d.split, d.revision): d for d in (c.dataset for c in real)
    }
    for dataset in texts.values():
        reach_text(dataset)
    labelled = {
        (c.dataset.path, *c.evaluation.label_fields): c
        for c in real
        if "probes" in c.evaluation.meaning
    }
    for config in labelled.values():
        check_labels(config.dataset, config.evaluation.label_fields)


def warn_of_own_disks(configs: Sequence[Config], sweep: Path) -> None:
    """A line for each folder that the nodes of a cluster will not see, where that can be told."""
    from tcsae.data.weights import cache_folder

    lost = "put it where all of them see it"
    places = {f"the sweep's folder {sweep}": (sweep, lost)}
    again = "every node harvests for itself; on a shared disk it is done once"
    for store in {c.store.dir: c.store for c in configs if c.store.mode == "disk"}.values():
        places[f"store.dir={store.dir}"] = Path(store.dir).expanduser(), again
    if any(c.model.package is not None for c in configs):
        places[f"TCSAE_CACHE={cache_folder()}"] = cache_folder(), lost
    own = {Path(p).resolve() for p in ("/tmp", "/var/tmp", "/dev/shm", tempfile.gettempdir())}
    for name, (path, advice) in places.items():
        if own & {path.resolve(), *path.resolve().parents}:
            log.warning(f"{name} is a temporary folder, of which every node has its own: {advice}")
