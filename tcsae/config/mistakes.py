"""Errors of Hydra, OmegaConf and the disk as one line that says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tcsae.base.errors import UserError
from tcsae.base.files import disk_reason
from tcsae.config.compose import conf_folder


def for_the_user(error: Exception) -> str | None:
    """One line for an error that a user can mend; None for a defect, which needs its traceback."""
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
