"""`python -m tcsae.train`: compose the configuration, run the job, return its metric.

Only Hydra is imported at the top: `--help` and `--cfg job` need nothing else.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tcsae import numbers
from tcsae.errors import (
    INTERRUPTED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    Interrupted,
    SweepFailed,
    UserError,
)
from tcsae.files import disk_reason

log = logging.getLogger(__name__)

JOB_FAILED_EXIT_CODE = 1
KILLED_EXIT_CODE = 130  # as shells say it of SIGINT


def conf_folder() -> Path:
    """conf/ inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def _run_name(*, _root_: DictConfig) -> str:
    """Resolver: the run's folder name. A config that is not valid has none, so nothing is made."""
    from tcsae.composed import to_config
    from tcsae.config import run_name

    return run_name(to_config(_root_))


def _sweep_name(arguments: list[str]) -> str:
    """The same sweep command, in whatever order and with whatever launcher, the same folder."""
    overrides = sorted(a for a in arguments if "=" in a and not a.startswith(("hydra", "-")))
    digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:10]
    named = [a.partition("=")[2] for a in overrides if a.startswith("+experiment=")]
    return f"{named[0] if named else 'sweep'}-{digest}"


def _dry_run(arguments: list[str]) -> list[str]:
    """`--dry-run`, as the key it stands for."""
    key = "hydra.launcher.dry_run=true"
    return [a for a in arguments if a != "--dry-run"] + [key] * ("--dry-run" in arguments)


def _task(composed: DictConfig) -> float:
    from tcsae.composed import to_config
    from tcsae.run import run

    folder = Path(HydraConfig.get().runtime.output_dir)
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        info = run(to_config(composed), folder)
    except Interrupted as stopped:
        log.warning(f"{stopped}; the same command goes on from here")
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        line = for_the_user(error)
        if line is None or not single:
            raise  # a defect; or one job of several, which must not hide the others'
        # Here, because Hydra adds a line of its own to what it gets to see.
        _say(line)
        sys.exit(USER_ERROR_EXIT_CODE)
    return info["metrics"]["reconstruction_quality"]["explained_variance"]


def _say(message: str) -> None:
    print(f"tcsae: {message}", file=sys.stderr)


# ------------------------------------------------------------------------ errors in one line


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _known_keys() -> list[str]:
    keys: set[str] = set()
    for file in conf_folder().rglob("*.yaml"):
        content = OmegaConf.to_container(OmegaConf.load(file))
        if not isinstance(content, dict):
            continue
        is_global = "@package _global_" in file.read_text() or file.name == "train.yaml"
        group = ".".join(file.relative_to(conf_folder()).parent.parts)
        prefix = "" if is_global else f"{group}."
        for key, value in content.items():
            if key in ("defaults", "hydra", "_target_"):
                continue
            inner = [f"{key!s}.{name!s}" for name in value] if isinstance(value, dict) else []
            keys |= set(inner or [prefix + str(key)])
    return sorted(keys)


def _one_line(error: BaseException) -> str:
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause)
    text = next((t for t in (" ".join(str(c).split()) for c in _causes(error)) if t), repr(error))
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown and "No match in the defaults list" not in text:
        key = unknown[1]
        near = difflib.get_close_matches(key, _known_keys(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "--cfg job prints the keys"
        return f"{key}: no such key; {hint}"
    text = text.partition(" Config search path")[0]
    missing = re.search(r"Missing mandatory value: .*?full_key: (\S+)", text)
    if missing:
        return f"{missing[1]}: must be given ({missing[1]}=...)"
    option = re.search(r"Could not find '([^'/]+)/([^']*)'", text)
    if option:
        group, given = option.groups()
        listed = text.partition(f"Available options in '{group}':")[2].split()
        number = "any finite number, or " if group in ("window", "lambda", "layer") else ""
        return f"{group} = {given}: must be {number}one of {', '.join(listed)}"
    return text


def for_the_user(error: Exception) -> str | None:
    """One line for what a user can mend; None for a defect, which needs its traceback."""
    if isinstance(error, (UserError, HydraException, OmegaConfBaseException)):
        return _one_line(error)
    for cause in _causes(error):
        # Hydra writes to the run folder before the job begins.
        if (reason := disk_reason(cause)) is not None:
            where = getattr(cause, "filename", None) or "the run folder (hydra.run.dir)"
            return f"cannot write {where}: {reason}"
        if isinstance(cause, OSError) and cause.filename is not None:
            return f"{cause.filename}: {cause.strerror}"
    return None


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, and leave in one line
    # Threads that wait by spinning take the cores from whatever else runs on the machine, and on a
    # busy one each other's. Read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.argv[1:] = _dry_run(sys.argv[1:])
    numbers.install()
    OmegaConf.register_new_resolver("tcsae.run_name", _run_name, replace=True)
    # By the environment, because the jobs of a sweep see their own overrides only.
    os.environ.setdefault("TCSAE_SWEEP", _sweep_name(sys.argv[1:]))
    app = hydra.main(config_path=str(conf_folder()), config_name="train", version_base="1.3")(_task)
    logging.raiseExceptions = False  # a log that cannot be written must not drown the message
    try:
        app()
    except KeyboardInterrupt:
        _say("stopped at once; the same command goes on from what was saved")
        sys.exit(KILLED_EXIT_CODE)
    except Exception as error:
        line = for_the_user(error)
        if line is None:
            raise
        _say(line)
        sys.exit(JOB_FAILED_EXIT_CODE if isinstance(error, SweepFailed) else USER_ERROR_EXIT_CODE)


if __name__ == "__main__":
    main()
