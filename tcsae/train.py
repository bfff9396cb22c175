"""`python -m tcsae.train`: compose the configuration, run the job, return its metric.

Only Hydra and the configuration are imported at the top: `--help` and `--cfg job` need no torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tcsae import cli
from tcsae.base import ranks
from tcsae.base.errors import INTERRUPTED_EXIT_CODE, Interrupted
from tcsae.config import Config, run_name
from tcsae.config.arguments import OURS, arranged
from tcsae.config.compose import prepare_hydra, to_config
from tcsae.config.folder import conf_folder
from tcsae.config.mistakes import for_the_user
from tcsae.launch.hydra_keys import WRITE_NOTHING, refuse_of_one_run, trains_nothing
from tcsae.launch.plan import cost_lines
from tcsae.launch.prepare import prepare
from tcsae.launch.together import agree, run_shared, speak_less

log = logging.getLogger(__name__)


def _run_name(*, _root_: DictConfig) -> str:
    """Resolver: the run's folder name. A config that is not valid has none, so nothing is made."""
    hydra_part = _root_.get("hydra")
    if hydra_part is not None and hydra_part.mode == RunMode.RUN:
        refuse_of_one_run(hydra_part)
    return run_name(to_config(_root_))


def _sweep_name(arguments: list[str]) -> str:
    """The same sweep command, in whatever order and with whatever launcher, the same folder."""
    overrides = sorted(a for a in arguments if "=" in a and not a.startswith(("hydra", "-")))
    digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:10]
    named = [a.partition("=")[2] for a in overrides if a.startswith("+experiment=")]
    return f"{named[0] if named else 'sweep'}-{digest}"


def _our_flags(arguments: list[str]) -> list[str]:
    """`--dry-run`, `--prepare` and `--harvest`, as the keys they stand for."""
    asked = [key for flag, key in OURS.items() if {flag, key} & set(arguments)]
    kept = [a for a in arguments if a not in (*OURS, *asked)]
    return [*kept, *asked, *WRITE_NOTHING] if asked else arguments


def _before(config: Config, launcher: Any) -> None:
    """What a single run will cost, as the plan of a sweep says it, or what it needs beforehand."""
    log.info(f"one run, {run_name(config)}")
    if launcher.options.prepare:
        agree([config], Path())
        return prepare([config], launcher.options.prepare)
    for line in cost_lines([config], [[0]], launcher.options, launcher.device()):
        log.info(line)


def _task(composed: DictConfig) -> float | None:
    single = HydraConfig.get().mode == RunMode.RUN
    speak_less(logging.ERROR)
    try:
        if single:
            refuse_of_one_run(HydraConfig.get())
        config = to_config(composed)
        if single and trains_nothing(HydraConfig.get().launcher):
            _before(config, instantiate(HydraConfig.get().launcher))
            return None
        folder = Path(HydraConfig.get().runtime.output_dir)
        info = run_shared(config, folder)
    except Interrupted as stopped:
        # Into the log too: a job that was preempted shows there why it ended.
        log.warning(f"{stopped}; the same command goes on from here")
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        line = for_the_user(error)
        if line is None or not single:
            raise  # a defect; or one job of several, which must not hide the others'
        # Here, because Hydra adds a line of its own to what it gets to see.
        cli.refuse(line)
    if info is None:
        return None
    return info["metrics"]["reconstruction_quality"]["explained_variance"]


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, and leave in one line
    # Threads that wait by spinning take the cores from whatever else runs on the machine, and on a
    # busy one each other's. Read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with cli.command():
        sweep_name = _sweep_name(sys.argv[1:])
        sys.argv[1:] = _our_flags(arranged(sys.argv[1:]))
        ranks.begin()
    prepare_hydra()
    OmegaConf.register_new_resolver("tcsae.run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("tcsae.sweep_name", lambda: sweep_name, replace=True)
    app = hydra.main(config_path=str(conf_folder()), config_name="train", version_base="1.3")(_task)
    logging.raiseExceptions = False  # a log that cannot be written must not drown the message
    with cli.command(), ranks.leaving():
        app()


if __name__ == "__main__":
    main()
