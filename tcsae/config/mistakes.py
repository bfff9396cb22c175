"""Errors of Hydra, OmegaConf and the disk as one line that says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tcsae.base.errors import UserError
from tcsae.base.files import disk_reason
from tcsae.config.folder import conf_folder


def for_the_user(error: Exception) -> str | None:
    """One line for an error that a user can mend; None for a defect, which needs its traceback."""
    if isinstance(error, (UserError, HydraException, OmegaConfBaseException)):
        return _one_line(error)
    for cause in _causes(error):
        if (size := _memory_asked(cause)) is not None:
            return (
                f"out of memory{size}: lower training.batch_contexts or sae.d_sae, "
                "model.forward_contexts where it is the language model's, or train fewer SAEs side "
                "by side (hydra.launcher.pack)"
            )
        # Hydra writes to the run folder before the job begins.
        if (reason := disk_reason(cause)) is not None:
            where = getattr(cause, "filename", None) or "the run folder (hydra.run.dir)"
            return f"cannot write {where}: {reason}"
        if isinstance(cause, OSError) and cause.filename is not None:
            return f"{cause.filename}: {cause.strerror}"
    return None


def _memory_asked(error: BaseException) -> str | None:
    """How much memory there was not, in words that may be empty; None for any other error."""
    text = str(error)
    is_torch = isinstance(error, RuntimeError) and re.search(
        r"can't allocate memory|not enough memory|out of memory", text
    )
    if not isinstance(error, MemoryError) and not is_torch:
        return None
    asked = re.search(r"[Tt]ri(?:ed|ing) to allocate ([\d.]+ ?\w+)", text)
    return f" (it tried to have {asked[1]} more)" if asked else ""


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


def _names() -> set[str]:
    """Keys and groups."""
    groups = (path for path in conf_folder().iterdir() if path.is_dir())
    return {*_known_keys(), *(path.name for path in groups)}


def _one_line(error: BaseException) -> str:
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return str(cause)
    text = next((t for t in (" ".join(str(c).split()) for c in _causes(error)) if t), repr(error))
    written = next(
        (c.override for c in _causes(error) if isinstance(c, OverrideParseException)), ""
    )
    key, _, value = (written or "").partition("=")
    if "=" in value and not value.startswith(("'", '"')):
        return f"{key}: a value with = in it must be quoted: '{key}=\"{value}\"'"
    if ambiguous := re.search(r"Ambiguous value for argument '(.+?)' 1\.", text):
        if (name := ambiguous[1].partition("=")[0]) not in _names():
            return _no_such_key(name)
        return (
            f"{ambiguous[1]}: several values are a sweep, for which --multirun is added; "
            "a list is written [a,b]"
        )
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown and "No match in the defaults list" not in text:
        return _no_such_key(unknown[1])
    text = text.partition(" Config search path")[0]
    missing = re.search(r"Missing mandatory value: .*?full_key: (\S+)", text)
    if missing:
        return f"{missing[1]}: must be given ({missing[1]}=...)"
    option = re.search(r"Could not find '([^']+)/([^'/]*)'", text)
    if option:
        group, given = option.groups()
        listed = text.partition(f"Available options in '{group}':")[2].split()
        number = "any finite number, or " if group in ("window", "lambda", "layer") else ""
        near = _OPTIONS.get(given)
        meant = f"; did you mean {group}={near}?" if near in listed else ""
        return f"{group} = {given}: must be {number}one of {', '.join(listed)}{meant}"
    return text


_OPTIONS = {
    "submitit_slurm": "slurm",
    "submitit_local": "local",
    "joblib": "local",
    "loky": "local",
}
"""Launchers of others, by ours that do what they do."""
_KEYS = {
    "lr": "training.lr",
    "learning_rate": "training.lr",
    "tokens": "training.tokens",
    "n_tokens": "training.tokens",
    "steps": "training.tokens",
    "epochs": "training.tokens",
    "batch_size": "training.batch_contexts",
    "batch": "training.batch_contexts",
    "device": "model.device",
    "path": "dataset.path",
    "ctx_len": "dataset.context_size",
    "context_length": "dataset.context_size",
    "l1": "sae.l1_coefficient",
    "d_hidden": "sae.d_sae",
    "width": "sae.d_sae",
    "l0": "training.target_l0",
    "project": "tracking.project",
    "lambda_": "lambda",
    "out": "hydra.run.dir",
    "output_dir": "hydra.run.dir",
}
"""What people type first, by the key that does it."""


def _no_such_key(key: str) -> str:
    group, _, name = key.rpartition(".")
    if group == "sae":
        of = sorted(
            file.stem
            for file in (conf_folder() / "sae").glob("*.yaml")
            if OmegaConf.select(OmegaConf.load(file), key) is not None
        )
        if of:
            return f"{key}: not a key of the chosen architecture; of sae={', sae='.join(of)} it is"
    known = _known_keys()
    if key in known or key.startswith("hydra.job.env_"):
        # A dictionary whose own keys are the user's to name.
        shown = key if key in known else key.rpartition(".")[0]
        return f"{key}: its keys are added with a plus, each alone: +{shown}.NAME=VALUE"
    near = [_KEYS[key]] if key in _KEYS else []
    near = near or [k for k in known if k.rpartition(".")[2] == name]
    near = near or difflib.get_close_matches(key, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "--cfg job prints the keys"
    return f"{key}: no such key; {hint}"
