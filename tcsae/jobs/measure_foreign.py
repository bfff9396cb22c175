"""An SAE that was not trained here, measured as a run's is: a run folder, with its pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tcsae.base.allocator import keep_large_blocks
from tcsae.base.errors import UserError
from tcsae.base.files import make_folder, read_json, write_json, write_text
from tcsae.base.signals import StopRequest
from tcsae.base.stages import account, stage, timing
from tcsae.config import LoadedConfig, parse_any, run_id, run_name
from tcsae.data.activation_model import ActivationModel
from tcsae.data.stream import open_model, open_stream
from tcsae.jobs.cautions import cautions
from tcsae.jobs.finish import measure, measured_info, say_finished, say_results, write_pages
from tcsae.jobs.foreign import ForeignSAE, composed
from tcsae.measure.evaluation import on_the_model
from tcsae.runs.folder import RunFolder
from tcsae.sae.formats.saelens import load_saelens, save_saelens

log = logging.getLogger(__name__)


def evaluate_sae(
    found: ForeignSAE, overrides: Sequence[str], output: Path | None, stop: StopRequest
) -> Path:
    """Measure a loaded SAE on held-out contexts; the run folder with the results.

    Args:
        found: of `tcsae.jobs.foreign.from_folder` or `from_release`.
        overrides: "key=value" as on the command line.
        output: the run folder. None: outputs/<name made from the config>.

    Raises:
        UserError: what the user can mend, in one line; no folder was made.
        Interrupted: a signal came; the same call goes on.
    """
    started = time.monotonic()
    keep_large_blocks()
    config = composed(found, overrides)
    model = open_model(config)
    _check_width(found, config, model)
    said = cautions(found.facts, config, model)
    source = config.source.model_copy(update={"cautions": said})
    config = config.model_copy(update={"source": source})
    run = RunFolder(output or Path("outputs") / run_name(config))
    folder = run.path
    for text in said:
        log.warning(text)
    if _holds_it(config, run):
        say_finished(run)
        return folder
    # Before the folder is made: what is wrong with text or weights shows here.
    stream = open_stream(config, stop, model)
    with run.owned():
        run.claim(config)
        run.final_info.unlink(missing_ok=True)
        write_json(run.content, stream.content)
        make_folder(run.hydra)  # where a run's report finds its command
        write_text(run.overrides, yaml.safe_dump(list(overrides)))
        _measure(found, config, stream, run, stop, started)
    return folder


def _measure(
    found: ForeignSAE,
    config: LoadedConfig,
    stream: Any,
    run: RunFolder,
    stop: StopRequest,
    started: float,
) -> None:
    stream = stream.read_once(stop)
    save_saelens(run.sae, found.sae, found.metadata(config))
    sae, sae_cfg = load_saelens(run.sae)
    with timing() as own:
        with stage("evaluate model"):
            (behaviour,) = on_the_model([sae], config, stream.model, stream.evaluation, stop)
        results = measure(sae, sae_cfg, behaviour, config, stream, run, stop)
    info = {
        "training_steps": None,
        "source": config.source.model_dump(mode="json"),
        **measured_info(config, stream, results, time.monotonic() - started),
        "seconds": account({}, own, 1),
    }
    write_json(run.final_info, info)
    loaded = run.load()
    write_pages(loaded)
    say_results(loaded, results.evaluation)


def _check_width(found: ForeignSAE, config: LoadedConfig, model: ActivationModel) -> None:
    if found.sae.d_in != model.d_in:
        raise UserError(
            f"{found.source.folder}: d_in is {found.sae.d_in}, against {model.d_in} of "
            f"{config.model.name} at {model.hook_name}: give the model it was made for "
            f"(model=..., layer=...)"
        )


def _holds_it(config: LoadedConfig, run: RunFolder) -> bool:
    """Whether the folder has the finished result. UserError if it has anything else in it."""
    folder = run.path
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    content = read_json(run.config) if run.is_begun else None
    if not isinstance(content, dict) or not {"source", "evaluation"} <= content.keys():
        raise UserError(f"{folder} is not empty: choose another folder with --output")
    before = parse_any(content)
    if not isinstance(before, LoadedConfig) or run_id(before) != run_id(config):
        raise UserError(f"{folder} holds another result: choose another folder with --output")
    return run.is_finished and not config.rerun
