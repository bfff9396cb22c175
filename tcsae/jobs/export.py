"""A finished run's SAE, ready to share: as a folder, or on the Hugging Face hub.

The folder has the SAE in SAELens' format, what was measured, the run's config, and a model card.
Absolute paths of the machine that made the run stay behind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tcsae import __version__
from tcsae.base.errors import UserError
from tcsae.base.files import (
    TEMPORARY_SUFFIX,
    disk_errors,
    make_folder,
    read_json,
    write_json,
    write_text,
)
from tcsae.base.run_files import RunFiles
from tcsae.config import Config
from tcsae.jobs.model_card import model_card
from tcsae.runs.folder import LoadedRun, load_run

CARD = "README.md"
_RUN = RunFiles("")
MARK = _RUN.export_mark.name
_JSON_FILES = tuple(
    path.as_posix() for path in (_RUN.config, _RUN.sae_cfg, _RUN.eval.core, _RUN.eval.consistency)
)
_CFG = _RUN.sae_cfg.as_posix()
_WEIGHTS = _RUN.sae_weights.as_posix()
FILES = (MARK, CARD, _WEIGHTS, *_JSON_FILES)
"""All that an export holds."""


def export_run(run: Path, output: Path) -> Path:
    """Write the export of the finished run in `run` to `output`, whole or not at all.

    Raises:
        UserError: `run` is no finished run, or `output` holds anything but an earlier export.
    """
    output = Path(output)
    _check_output(output)
    parent = make_folder(output.resolve().parent)
    with _built(run, parent, output.name) as folder, disk_errors(output):
        _swap(folder, output)
    return output


def upload_run(run: Path, name: str, private: bool = False) -> str:
    """Export the finished run in `run` to the repository `name` of the Hugging Face hub; its URL.

    The repository is created if need be. Raises UserError, with what to do, for a run that is not
    finished, without a login, offline, or for a name that the hub does not accept.
    """
    from huggingface_hub import HfApi, get_token

    with _built(run, Path(tempfile.gettempdir()), "tcsae-export", hub_name=name) as folder:
        if get_token() is None:
            raise UserError(
                "not logged in to the Hugging Face hub: run `hf auth login` or set HF_TOKEN, or "
                "use --output FOLDER"
            )
        with _hub_errors(name):
            api = HfApi()
            url = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=name, folder_path=folder, commit_message="SAE exported by tcsae"
            )
    return str(url)


@contextmanager
def _built(run: Path, parent: Path, name: str, hub_name: str | None = None) -> Iterator[Path]:
    """The export in a temporary folder in `parent`, which is gone after the block."""
    loaded = load_run(run)
    with disk_errors(parent):
        outer = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=TEMPORARY_SUFFIX, dir=parent))
    try:
        folder = outer / "export"
        for file in (*_JSON_FILES, _WEIGHTS):
            make_folder((folder / file).parent)
        for file in _JSON_FILES:
            content = read_json(run / file)
            if file == _CFG:
                content["metadata"] = {**content["metadata"], **_said_by_saelens(loaded)}
            write_json(folder / file, without_local_paths(content))
        with disk_errors(folder):
            shutil.copyfile(run / _WEIGHTS, folder / _WEIGHTS)
        cfg = read_json(RunFiles(folder).sae_cfg)
        write_text(folder / CARD, model_card(loaded, cfg, hub_name))
        write_json(folder / MARK, {"tcsae": __version__, "run": loaded.final_info.get("unique_id")})
        yield folder
    finally:
        shutil.rmtree(outer, ignore_errors=True)


def _said_by_saelens(run: LoadedRun) -> dict[str, Any]:
    """What SAELens 6.54 writes into the metadata at the end of a training, of held-out text."""
    measured = run.core["eval_result_metrics"]["sparsity"]
    found: dict[str, Any] = {"l0": measured["l0"]}
    if "density" in run.per_feature:
        found["num_dead_features"] = int((run.per_feature["density"] == 0).sum())
    if isinstance(run.config, Config):
        training = run.config.training
        found["training_architecture_details"] = {
            **run.config.sae.model_dump(mode="json"),
            "lr": training.lr,
            "training_tokens": training.tokens,
            "seed": run.config.seed,
            "window": run.config.window,
            "lambda": run.config.lambda_,
            "consistency": run.config.consistency.label,
        }
    return found


def without_local_paths(value: Any) -> Any:
    """JSON content with every absolute path in it replaced by its last part."""
    if isinstance(value, dict):
        return {key: without_local_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_local_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(value)
        if path.is_absolute() or value.startswith("~"):
            return path.name or "."
    return value


def _check_output(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file: choose a folder")
    found = {p.relative_to(output).as_posix() for p in output.rglob("*") if not p.is_dir()}
    if not found:
        return
    if MARK not in found or (others := sorted(found - set(FILES))):
        held = f" ({', '.join(others[:3])})" if MARK in found else ""
        raise UserError(
            f"{output} is not empty and holds more than an earlier export{held}: choose another "
            "folder or empty it"
        )


def _swap(folder: Path, output: Path) -> None:
    """Put `folder` in the place of `output`; what was there comes back if that fails."""
    old = folder.with_name("old")
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(folder, output)
    except OSError:
        if old.exists():
            os.replace(old, output)
        raise


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What the hub refuses, and a network that is not there, as one line with what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{name!r} is no name for a repository on the hub: {error}") from None
    except OfflineModeIsEnabled:
        raise UserError(
            "the Hugging Face hub is switched off here: unset HF_HUB_OFFLINE, or use --output "
            "FOLDER and upload that"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = {
            401: "the login was not accepted: run `hf auth login` with a token that may write",
            403: "this login may not write there: choose a name of your own, or another token",
        }.get(status or 0, str(error).strip().splitlines()[0])
        raise UserError(f"cannot upload to {name}: {reason}") from None
    except Exception as error:
        if not _is_network_error(error):
            raise
        raise UserError(
            f"cannot reach the Hugging Face hub ({type(error).__name__}): check the network, or "
            "use --output FOLDER and upload that later"
        ) from None


def _is_network_error(error: Exception) -> bool:
    # By name: versions of huggingface_hub bring requests, httpx or its successor.
    known = {"TransportError", "ConnectionError", "Timeout", "TimeoutError"}
    return any(kind.__name__ in known for kind in type(error).__mro__)
