"""The command line as people write it, brought into the form that Hydra reads."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.errors import HydraException

from tcsae.config.folder import conf_folder

MULTIRUN = ("--multirun", "-m")
OURS = {
    "--dry-run": "hydra.launcher.dry_run=true",
    "--prepare": "hydra.launcher.prepare=text",
    "--harvest": "hydra.launcher.prepare=activations",
}
"""Flags of ours, and the keys that they stand for."""
_ONE_OF = (*MULTIRUN, "--run", "-r", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")
_LIST = re.compile(r"[^=]+=.*,.*|[^=]+=(choice|range|glob|interval)\(.*")


def arranged(arguments: Sequence[str]) -> list[str]:
    """Flags first, then overrides: between overrides Hydra's parser does not know them.

    Raises HydraException for a flag that there is not.
    """
    if len(chosen := [a for a in arguments if a in _ONE_OF]) > 1:
        raise HydraException(f"{' and '.join(chosen)}: only one of them can be given")
    flags: list[str] = []
    overrides: list[str] = []
    takes_value = _flags()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            overrides.append(_folder_quoted(argument))
            continue
        name, given, _ = argument.partition("=")
        if name == "--experimental-rerun":
            raise HydraException(
                f"{name}: it reads a pickled configuration, which nothing here does; the command "
                "in a run's report.html repeats it, with rerun=true"
            )
        if name in OURS:
            flags.append(argument)
            continue
        if name not in takes_value:
            raise HydraException(_unknown_flag(argument, takes_value))
        flags.append(argument)
        if takes_value[name] and not given and rest:
            flags.append(rest.pop(0))
    _check_copied(overrides)
    return flags + _for_the_jobs(with_model(overrides))


def with_model(overrides: Sequence[str]) -> list[str]:
    """The model that other choices choose too, which Hydra lets only a later group do:
    dataset=activations its own, and model.path alone `other`, for what the default model's option
    says of its layers and its first token is not true of the folder's."""
    parts = (override.partition("=") for override in overrides)
    given = {key.lstrip("+"): value for key, _, value in parts}
    if "model" in given:
        return [*overrides, *_named_by_folder(given, given["model"])]
    if "dataset=activations" in overrides:
        return [*overrides, "model=activations"]
    named = _named_by_folder(given, "other")
    has_name = named or "model.name" in given
    if "model.path" in given and has_name and not _chooses_model(given.get("experiment")):
        return [*overrides, "model=other", *named]
    return list(overrides)


def _named_by_folder(given: Mapping[str, str], model: str) -> list[str]:
    """model.name of weights that have none but their folder's; none of a list of folders."""
    path = given.get("model.path", "").strip("'\"")
    if model != "other" or "model.name" in given or path in ("", "null") or set(path) & set(",$"):
        return []
    return [f"model.name={_in_quotes(Path(path).expanduser().resolve().name)}"]


def _chooses_model(experiment: str | None) -> bool:
    """Whether one of these options of conf/experiment has a model of its own."""
    folder = conf_folder() / "experiment"
    files = [folder / f"{name}.yaml" for name in re.findall(r"\w+", experiment or "")]
    return any("override /model:" in file.read_text() for file in files if file.is_file())


def _check_copied(overrides: Sequence[str]) -> None:
    """Hydra itself ends with a KeyError."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") != "hydra.job.env_copy":
            continue
        if missing := [name for name in re.findall(r"\w+", value) if name not in os.environ]:
            raise HydraException(f"{override}: {', '.join(missing)} is not set here")


def _folder_quoted(override: str) -> str:
    """The name of a folder may hold what Hydra's grammar would take for a list or a key."""
    key, _, value = override.partition("=")
    plain = not value.startswith(("'", '"')) and "$" not in value
    if key in ("hydra.run.dir", "hydra.sweep.dir") and plain and set(value) & set(",="):
        return f"{key}={_in_quotes(value)}"
    return override


def _in_quotes(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _flags() -> dict[str, bool]:
    """Hydra's flags, and whether a value follows."""
    from hydra._internal.utils import get_args_parser

    return {
        name: action.nargs is None and action.dest != "version"
        for action in get_args_parser()._actions
        for name in action.option_strings
    }


def _unknown_flag(argument: str, known: dict[str, bool]) -> str:
    name, _, value = argument.lstrip("-").partition("=")
    flags = sorted(flag for flag in (*known, *OURS) if flag.startswith("--"))
    near = difflib.get_close_matches(f"--{name}", flags, n=1, cutoff=0.7)
    if near:
        return f"{argument}: no such flag; did you mean {near[0]}?"
    shown = f"{name}={value or 'VALUE'}"
    return f"{argument}: no such flag; keys are given without dashes ({shown}). --help shows both"


def _for_the_jobs(overrides: list[str]) -> list[str]:
    """Where a group is swept, keys below it belong to the jobs: the sweep itself is composed of
    the group's default option, which may not have them. A choice of one is left to the jobs."""
    swept = {o.partition("=")[0].lstrip("+~") for o in overrides if _LIST.fullmatch(o)}
    groups = tuple(f"{name}." for name in swept if "." not in name and "/" not in name)

    def placed(override: str) -> str:
        key, equals, value = override.partition("=")
        plain = equals and value and not _LIST.fullmatch(override)
        return f"{key}=choice({value})" if plain and key.startswith(groups) else override

    return [placed(override) for override in overrides] if groups else overrides
