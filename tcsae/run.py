"""One job: its folder, its identity, its stages.

Stages: contexts -> harvest -> train -> save `sae/` -> evaluate -> analyse -> `final_info.json`,
which marks the run as finished -> the pages made from all that. The same config finds the same
folder: it goes on where it was interrupted, and is not repeated once finished.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tcsae.analysis import analyse
from tcsae.config import Config, parse, run_id
from tcsae.data.language_model import LanguageModel, bfloat16_is_native
from tcsae.data.store import (
    ActivationBatches,
    ActivationStore,
    StreamSource,
    calibrate,
    load_or_build_contexts,
)
from tcsae.errors import UserError
from tcsae.evaluation import Evaluation, evaluate
from tcsae.files import (
    Lock,
    locked,
    make_folder,
    read_json,
    remove_temporaries,
    tensors_digest,
    write_json,
)
from tcsae.memory import keep_large_blocks
from tcsae.run_folder import load_run
from tcsae.sae.saelens_format import load_saelens, save_saelens
from tcsae.signals import StopRequest, stop_on_signal
from tcsae.tracking import Tracker
from tcsae.training.member import Member
from tcsae.training.trainer import Seat, train_bank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stream:
    """Training and held-out activations of one job (or of a bank of jobs that share them)."""

    model: LanguageModel
    train: ActivationBatches
    evaluation: ActivationBatches

    @property
    def content(self) -> dict[str, str]:
        """Names of what was really read, whatever paths the config has."""
        parts = {"training_contexts": self.train, "held_out_contexts": self.evaluation}
        ids = {name: {"ids": part.source.contexts.ids} for name, part in parts.items()}
        return {"weights": self.model.weights.identity} | {
            name: tensors_digest(tensors) for name, tensors in ids.items()
        }


def open_stream(config: Config, stop: StopRequest) -> Stream:
    """Contexts packed, activations harvested (or streamed), masks and scale known."""
    model = LanguageModel(config.model, config.layer)
    root = Path(config.store.dir).expanduser()
    contexts = load_or_build_contexts(config.dataset, model, root, stop)
    sources: list[Any] = []
    for what, part in zip(("harvest", "harvest (held-out)"), contexts, strict=True):
        if config.store.mode == "stream":
            sources.append(StreamSource(model, part))
            continue
        store = ActivationStore(root, model, part, config.store.shard_contexts)
        store.harvest(stop, what)
        sources.append(store)
    calibration = calibrate(sources[0], config.dataset.norm_filter)
    log.info(
        f"{len(contexts[0].ids)} training and {len(contexts[1].ids)} held-out contexts; median "
        f"norm {calibration.median_norm:.4g}, {100 * calibration.massive_share:.2f} % massive "
        "tokens left out"
    )
    batches = [ActivationBatches(source, calibration, model.device) for source in sources]
    return Stream(model, *batches)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Only one process works in a run folder."""
    with locked(make_folder(folder) / ".lock") as lock:
        if lock is Lock.BUSY:
            raise UserError(f"{folder} is in use by another process: wait for it, or stop it")
        yield


def _claim(config: Config, folder: Path) -> None:
    """The folder is this run's, new or begun before. Raises UserError if it is another's."""
    own = folder / "config.json"
    # A run that was refused before its first checkpoint has nothing to lose.
    has_results = any((folder / name).exists() for name in ("checkpoint", "sae", "final_info.json"))
    if own.is_file() and has_results:
        other = run_id(parse(read_json(own)))
        if other != run_id(config):
            raise UserError(
                f"{folder} holds another run ({other}, this is {run_id(config)}): choose another "
                "folder or remove it"
            )
    for part in (folder, *(inner for inner in folder.iterdir() if inner.is_dir())):
        remove_temporaries(part)
    write_json(own, config.dump())


def _check_content(stream: Stream, folder: Path) -> None:
    """Raises UserError if the run was begun with other text or weights under the same paths."""
    known, content = folder / "content.json", stream.content
    if (folder / "checkpoint").exists() and known.is_file():
        before = read_json(known)
        changed = [name for name, value in content.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"{folder} was begun with other content ({', '.join(changed)} changed since): "
                "remove it, choose another folder, or restore what was there"
            )
    write_json(known, content)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Do the job, or what is left of it, in `folder`; the content of final_info.json.

    Raises:
        UserError: what the user can mend, in one line.
        Interrupted: a signal came; calling it again goes on.
    """
    folder = Path(folder)
    with _owned(folder):
        _claim(config, folder)
        finished = folder / "final_info.json"
        if finished.is_file():
            if not config.rerun:
                if not (folder / "notes.txt").is_file():  # the last of the pages
                    write_pages(folder)
                log.info(f"already finished: {folder} (rerun=true repeats it)")
                return read_json(finished)
            # Checkpoints first: a repetition that is interrupted must go on, not start again.
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            finished.unlink()
        with stop_on_signal() as stop:
            return _run_stages(config, folder, stop)


def _run_stages(config: Config, folder: Path, stop: StopRequest) -> dict[str, Any]:
    started = time.monotonic()
    keep_large_blocks()
    stream = open_stream(config, stop)
    _check_content(stream, folder)
    torch.manual_seed(config.seed)
    tracker = Tracker(config, folder)
    exit_code = 1
    try:
        member = Member(
            config,
            stream.model.d_in,
            stream.train.calibration,
            stream.model.device,
            autocast=_bfloat16_products(config, stream.model.device),
        )
        seat = Seat(member, folder, tracker)
        train_bank([seat], stream.train, stop)
        save_saelens(folder / "sae", member.finished_sae(), _saelens_metadata(config, stream))
        sae, sae_cfg = load_saelens(folder / "sae")
        stop.check()
        evaluation = evaluate(sae, config, stream.model, stream.evaluation, stop, sae_cfg)
        evaluation.write(folder / "eval")
        if config.evaluation.analysis:
            analysis = analyse(
                sae,
                config,
                stream.model,
                stream.evaluation,
                evaluation.per_feature,
                stop,
                config.evaluation.redundancy_max_lag,
            )
            analysis.write(folder / "analysis")
            tracker.summary(analysis.headline)
        info = _final_info(config, seat, stream, evaluation, time.monotonic() - started)
        tracker.summary(evaluation.headline)
        write_json(folder / "final_info.json", info)
        write_pages(folder)
        _send_pages(folder, tracker)
        exit_code = 0
        _say_results(folder, evaluation)
        return info
    finally:
        tracker.finish(exit_code)


def _bfloat16_products(config: Config, device: str) -> bool:
    wanted = config.training.precision
    return bfloat16_is_native(device) if wanted == "auto" else wanted == "bfloat16"


def _saelens_metadata(config: Config, stream: Stream) -> dict[str, Any]:
    return {
        "model_name": config.model.name,
        "hook_name": stream.model.hook_name,
        "hook_head_index": None,
        "context_size": config.dataset.context_size,
        "prepend_bos": True,
        "model_from_pretrained_kwargs": {},
        "seqpos_slice": [None],
        "exclude_special_tokens": sorted(stream.model.special_ids.masked),
        "dataset_path": config.dataset.path,
        "training_architecture": config.sae.architecture,
        "window": config.window,
        "lambda": config.lambda_,
        "norm_limit": stream.train.calibration.norm_limit,
        "tcsae": config.dump(),
    }


def _final_info(
    config: Config, seat: Seat, stream: Stream, evaluation: Evaluation, wall_seconds: float
) -> dict[str, Any]:
    """The keys the experiment's first runs wrote, filled with what happened.

    Raises RuntimeError for a run without an optimizer step: there is no result to report.
    """
    steps = seat.member.optimizer_steps
    if steps < 1:
        raise RuntimeError("the optimizer took no step: there is nothing to report")
    tokens = int(seat.member.tokens_seen)
    return {
        "training_steps": steps,
        "final_loss": seat.member.last_loss.item(),
        "layer": stream.model.layer,
        "dict_size": config.sae.d_sae,
        "learning_rate": config.training.lr,
        "sparsity_penalty": getattr(config.sae, "l1_coefficient", None),
        "window_size": config.window,
        "lambda": config.lambda_,
        "seed": config.seed,
        "tokens": tokens,
        "training_seconds": seat.seconds,
        "tokens_per_second": steps * config.training.batch_contexts
        * config.dataset.context_size / seat.seconds,
        "wall_seconds": wall_seconds,
        "massive_token_share": stream.train.calibration.massive_share,
        "unique_id": run_id(config),
        "sae_set": f"tcsae/{config.model.name}/{config.dataset.name}",
        "sae_id": f"{stream.model.hook_name}/{config.sae.architecture}/{run_id(config)}",
        "eval_cfg": config.evaluation.model_dump(mode="json"),
        "metrics": evaluation.core["eval_result_metrics"],
        "consistency": evaluation.consistency["summary"],
    }


def write_pages(folder: Path) -> None:
    """report.html and notes.txt of a finished run, from what is in its folder."""
    from tcsae.report.notes import write_run_notes
    from tcsae.report.run_page import write_run_report

    write_run_report(folder)
    write_run_notes(folder)


def _send_pages(folder: Path, tracker: Tracker) -> None:
    """The report's figures and its table of features, to W&B."""
    if tracker.wandb.failed:
        return
    from tcsae.report.contents import Contents
    from tcsae.report.run_page import run_figures

    run = load_run(folder)
    columns = {"feature": list(range(run.config.sae.d_sae)), **run.consistency["per_feature"]}
    tracker.pages(run_figures(Contents.of(run)), columns)


def _say_results(folder: Path, evaluation: Evaluation) -> None:
    log.info("held-out results:")
    for line in evaluation.lines():
        log.info(f"  {line}")
    log.info(f"the report: {folder / 'report.html'}")
