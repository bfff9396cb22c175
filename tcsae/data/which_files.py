"""Which files of a folder are its text: what `datasets` would read of it.

Files that are left are named. By the dataset card's `configs`, else by the names of files.
"""

from __future__ import annotations

import glob
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tcsae.base.errors import UserError, first_line
from tcsae.base.files import read_json
from tcsae.data.readers import ALONE, KINDS, READERS, ROWS, kind_of

logger = logging.getLogger(__name__)


def which_files(path: Path, split: str, subset: str | None = None) -> tuple[Path, list[Path]]:
    """The files that are the text of a file or folder, and the folder that names them.

    Raises UserError if there are none, or no such split or subset.
    """
    if path.is_dir():
        saved = path / "dataset_dict.json"
        if saved.is_file():
            _no_subset(path, subset)
            return _of_saved(saved, split)
        if (named := _of_card(path, split, subset)) is not None:
            return path, named
        _no_subset(path, subset)
        return path, _files_in(path, split)
    _no_subset(path, subset)
    if kind_of(path) not in READERS:
        raise UserError(f"{path} is none of {KINDS}: give text in one of these forms")
    if split != "train":
        raise UserError(
            f"dataset.split={split}: {path} is one file, which has no splits: leave the key out"
        )
    return path.parent, [path]


def _no_subset(path: Path, subset: str | None) -> None:
    if subset is not None:
        raise UserError(f"dataset.subset={subset}: {path} has no subsets: leave the key out")


def _of_saved(saved: Path, split: str) -> tuple[Path, list[Path]]:
    """Of a DatasetDict.save_to_disk."""
    content = read_json(saved)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not splits:
        raise UserError(f"{saved} names no splits: save the dataset again")
    if split not in splits:
        raise UserError(
            f"{saved.parent} has no split {split}: set dataset.split to one of "
            + ", ".join(map(str, splits))
        )
    root = saved.parent / split
    return root, _files_in(root, "train")


# ---------------------------------------------------------------- by the dataset card


def _of_card(root: Path, split: str, subset: str | None) -> list[Path] | None:
    """The files that `configs` in the card's header names; None: it names none."""
    configs = _configs(root / "README.md")
    if not configs:
        return None
    # The rule of `datasets`: the one called default or marked so, or the only one.
    usual = [name for name, c in configs.items() if c.get("default") is True or name == "default"]
    name = subset or (usual or [*configs] if len(configs) == 1 or usual else [None])[0]
    if name is None or name not in configs:
        asked = "several subsets" if subset is None else f"no subset {subset}"
        raise UserError(f"{root} has {asked}: set dataset.subset to one of {', '.join(configs)}")
    patterns = _patterns(configs[name], root)
    if split not in patterns:
        raise UserError(
            f"{root} has no split {split}: set dataset.split to one of {', '.join(patterns)}"
        )
    found = {
        root / match
        for pattern in patterns[split]
        for match in glob.glob(pattern, root_dir=root, recursive=True)
        if not Path(pattern).is_absolute() and (root / match).is_file()
    }
    # By name: files in a cache of the hub are links to elsewhere.
    inside = {p for p in found if ".." not in p.relative_to(root).parts}
    taken = sorted(p for p in inside if kind_of(p) in READERS)
    if not taken:
        raise UserError(
            f"{root}: its README.md names {', '.join(patterns[split])} for split {split}, and no "
            f"{KINDS} file there is so named: fetch what is missing"
        )
    logger.info("%s: %s, split %s, by its README.md: %d files", root, name, split, len(taken))
    return taken


def _configs(card: Path) -> dict[str, dict[str, Any]]:
    """The named sets of files in a dataset card's YAML header; none where it has no such header."""
    if not card.is_file():
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        if file.readline().strip() != "---":
            return {}
        header = []
        for line in file:
            if line.strip() == "---":
                break
            header.append(line)
    try:
        content = yaml.safe_load("".join(header))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{card}: its header is not YAML ({first_line(error)})") from error
    configs = content.get("configs") if isinstance(content, dict) else None
    return {
        str(c["config_name"]): c
        for c in (configs if isinstance(configs, list) else [])
        if isinstance(c, dict) and "config_name" in c and ("data_files" in c or "data_dir" in c)
    }


def _patterns(config: dict[str, Any], root: Path) -> dict[str, list[str]]:
    """Split -> patterns of its files, from any of the forms that `datasets` documents."""
    folder = config.get("data_dir")
    if not isinstance(folder, str | None):
        raise UserError(f"{root}: data_dir in its README.md is no text")
    files = config.get("data_files", "**")
    entries = files if isinstance(files, list) else [files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        given = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        paths = given.get("path")
        paths = paths if isinstance(paths, list) else [paths]
        if "split" not in given or not all(isinstance(path, str) for path in paths):
            raise UserError(f"{root}: data_files in its README.md is of no known form")
        inside = [f"{folder}/{path}" if folder else path for path in paths]
        patterns.setdefault(str(given["split"]), []).extend(inside)
    return patterns


# ---------------------------------------------------------------- by names


# What stands beside data and is none, in the folder of a dataset.
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|dataset_?card)\b.*", re.I
)
_OF_DATASETS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
# As `datasets` finds splits by the names of folders and files.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_OF_SPLIT = re.compile(rf"(?:.*[-_.])?({'|'.join(_SPLITS)})(?:[-_.]?\d.*)?")


def _files_in(root: Path, split: str) -> list[Path]:
    """The data under `root`: its readable files without what describes them, and where they are
    of several splits by their names, those of `split`.

    Raises UserError if there are none.
    """
    found = _readable(root)
    has_rows = any(kind_of(path) in ROWS for path in found)
    taken = [path for path in found if not (has_rows and _NO_DATA.fullmatch(path.name))]
    saved = root / "state.json"  # of save_to_disk, which may leave files of an earlier saving
    if saved.is_file() and isinstance(state := read_json(saved), dict) and "_data_files" in state:
        names = {str(entry.get("filename")) for entry in state["_data_files"]}
        taken = [path for path in taken if path.name in names] or taken
    splits = {path: _split_of(path.relative_to(root)) for path in taken}
    named = sorted({name for name in splits.values() if name})
    # One name alone may be chance; a folder without a part to train on has no splits.
    if len(named) > 1 and "train" in named:
        if split not in named:
            raise UserError(
                f"{root} has no split {split}: set dataset.split to one of {', '.join(named)}"
            )
        logger.info("%s: split %s of %s", root, split, ", ".join(named))
        taken = [path for path in taken if splits[path] == split]
    elif split != "train":
        raise UserError(
            f"dataset.split={split}: {root} has no splits (files or folders named train and "
            "validation or test): leave the key out"
        )
    beside = [path for path in found if path not in taken and splits.get(path) not in named]
    if beside:
        shown = ", ".join(path.relative_to(root).as_posix() for path in beside[:10])
        more = f" and {len(beside) - 10} more" if len(beside) > 10 else ""
        logger.warning("%s: not taken for data: %s%s", root, shown, more)
    return taken


def _split_of(name: Path) -> str | None:
    """Of its outermost folder that is named so, else of the file's own name."""
    for folder in name.parts[:-1]:
        if folder.lower() in _SPLITS:
            return _SPLITS[folder.lower()]
    found = _OF_SPLIT.fullmatch(name.name.split(".")[0].lower())
    return _SPLITS[found[1]] if found else None


def _readable(root: Path) -> list[Path]:
    """The readable files under `root`, sorted; hidden ones are skipped, others counted."""
    found, ignored = [], Counter[str]()
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        # `datasets` keeps the results of map() as cache-*.arrow beside the data itself.
        if kind_of(path) in READERS and not path.match("cache-*.arrow"):
            if path.name not in _OF_DATASETS:
                found.append(path)
        else:
            ignored[path.suffix.lower() or "no suffix"] += 1
    kinds_found = {kind_of(path) for path in found}
    sure = kinds_found - ALONE.keys() or kinds_found - {".json"} or kinds_found
    ignored.update(path.suffix.lower() for path in found if kind_of(path) not in sure)
    found = [path for path in found if kind_of(path) in sure]
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(ignored.items()))
    if not found:
        beside = f" (only {kinds})" if kinds else ""
        raise UserError(f"{root} holds no {KINDS} file{beside}: give text in one of these forms")
    if ignored:
        logger.warning("%s: files of other kinds ignored: %s", root, kinds)
    return found
