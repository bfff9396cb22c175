"""One job: its folder, how it ends, and the phases it goes through in a bank."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tcsae.base.apart import Calls
from tcsae.base.errors import Interrupted, UserError, first_line
from tcsae.base.files import read_json, write_json
from tcsae.base.log import speaking_of
from tcsae.base.run_files import RunFiles
from tcsae.base.signals import StopRequest
from tcsae.base.stages import Seconds, in_words, stage, timing
from tcsae.config import Config
from tcsae.data.devices import bfloat16_is_native
from tcsae.data.stream import Stream
from tcsae.jobs.finish import (
    Results,
    measure,
    measured_info,
    say_finished,
    say_results,
    write_pages,
)
from tcsae.jobs.sources import Sources
from tcsae.jobs.tracking import Tracker
from tcsae.jobs.wandb_run import check_environment
from tcsae.losses.laplacian import share_in_windows
from tcsae.metrics.reconstruction import ModelMetrics
from tcsae.products import choose, products_for
from tcsae.report.contents import Contents
from tcsae.report.origin import few_in_windows, in_a_row
from tcsae.report.run_page import run_figures
from tcsae.runs.folder import LoadedRun, RunFolder
from tcsae.runs.state import StateFile
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.saelens import load_saelens, save_saelens
from tcsae.training.member import Member
from tcsae.training.trainer import Seat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a job of a bank ended: with the content of final_info.json, or with an error."""

    info: dict[str, Any] | None = None
    error: Exception | None = None
    repeated: bool = True
    """False: the folder showed it as finished, and nothing was done."""


class Job:
    """One run: its folder, its state file, and how it ends. What it is at is one of the phases."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.files = config, RunFolder(folder)
        self.state = StateFile(folder)
        self.tracker: Tracker | None = None
        """Kept here to be ended whatever happens."""
        self.outcome: Outcome | None = None
        self.is_closed = False

    @property
    def title(self) -> str:
        return self.config.name or self.files.path.name

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """An error in the block is this job's outcome, and stops nobody else."""
        with speaking_of(self.files.path):
            try:
                yield
            except Interrupted:
                raise
            except Exception as error:
                self.fail(error)

    def fail(self, error: Exception) -> None:
        if self.outcome is None:
            self.outcome = Outcome(error=error)

    def claim(self, held: contextlib.ExitStack) -> None:
        """Take the folder for as long as `held` lasts; a finished run has its outcome at once."""
        held.enter_context(self.files.owned())
        self.files.claim(self.config)
        if self.files.is_finished and not self.config.rerun:
            Sources().check(self.config, self.files.path, self.files.content)
            say_finished(self.files)
            self.let_checkpoints_go()
            self.outcome = Outcome(read_json(self.files.final_info), repeated=False)
            return
        check_environment(self.config.tracking, self.config.name)
        if not self.files.is_finished:
            return
        # Checkpoints first: a repetition that is interrupted must go on, not start again.
        shutil.rmtree(self.files.checkpoints, ignore_errors=True)
        self.files.final_info.unlink()

    def let_checkpoints_go(self) -> None:
        """Of a finished run: they take most of its space, and nothing goes on from them."""
        if not self.config.training.keep_checkpoints:
            shutil.rmtree(self.files.checkpoints, ignore_errors=True)

    def say_failed(self, error: Exception) -> None:
        """Into the state file, once."""
        if self.state.state.state != "failed":
            text = "".join(traceback.format_exception(error))
            self.state.end("failed", first_line(error), text)

    def close(self) -> None:
        """The last word of the state file and of W&B; a second call does nothing."""
        if self.is_closed:
            return
        self.is_closed = True
        error = self.outcome.error if self.outcome else None
        if self.outcome is None:
            self.state.end("interrupted")
        elif error is None:
            self.state.end("done")
        else:
            self.say_failed(error)
        if self.tracker is not None:
            self.tracker.finish(int(self.outcome is None or error is not None))
            self.tracker = None


# ------------------------------------------------------------------------------------- phases
# Claimed -> Training -> Trained -> Scored -> Examined. Each holds what the next needs, no more.


@dataclass(frozen=True)
class Claimed:
    job: Job


@dataclass(frozen=True)
class Training:
    job: Job
    tracker: Tracker
    seat: Seat


@dataclass(frozen=True)
class Trained:
    """What is left of a seat when its training is over."""

    job: Job
    tracker: Tracker
    sae: SparseAutoencoder
    """As saved: on raw activations."""
    sae_cfg: dict[str, Any]
    steps: int
    """That the optimizer took."""
    tokens: int
    seconds: float
    final_loss: float


@dataclass(frozen=True)
class Scored:
    job: Job
    trained: Trained
    behaviour: ModelMetrics
    """What the language model does with the SAE in it."""


@dataclass(frozen=True)
class Examined:
    """All is measured, and written but for final_info.json."""

    job: Job
    trained: Trained
    results: Results
    analysis_headline: dict[str, Any]
    """Empty without an analysis."""
    seconds: Seconds
    """By stage."""


def begin(stream: Stream, claimed: Claimed) -> Training:
    job = claimed.job
    _check_content(stream, job.files)
    _check_windows(job.config, stream)
    tracker = job.tracker = Tracker(job.config, job.files.path)
    member = new_member(job.config, stream)
    return Training(job, tracker, Seat(member, job.files.path, tracker))


def new_member(config: Config, stream: Stream) -> Member:
    """The SAE of a config, at its start, on the stream's device."""
    device = stream.device
    torch.manual_seed(config.seed)
    choose(config.training.products, device)
    return Member(
        config,
        stream.model.d_in,
        stream.train.calibration,
        device,
        autocast=_bfloat16_products(config, device),
    )


def keep(stream: Stream, training: Training) -> Trained:
    """Save the trained SAE; its optimizer is let go.

    Raises RuntimeError for a run without an optimizer step: there is no result to report.
    """
    job, seat, member = training.job, training.seat, training.seat.member
    if member.optimizer_steps < 1:
        raise RuntimeError("the optimizer took no step: there is nothing to report")
    metadata = _saelens_metadata(job.config, stream)
    save_saelens(job.files.sae, member.finished_sae(), metadata)
    sae, sae_cfg = load_saelens(job.files.sae)
    return Trained(
        job,
        training.tracker,
        sae,
        sae_cfg,
        steps=member.optimizer_steps,
        tokens=int(member.tokens_seen),
        seconds=seat.seconds,
        final_loss=member.last_loss.item(),
    )


def examine(stream: Stream, stop: StopRequest, calls: Calls, scored: Scored) -> Examined:
    """What one job measures for itself; in a thread beside others where `stream.is_in_memory`."""
    stop.check()
    job, trained = scored.job, scored.trained
    with timing() as seconds:
        results = measure(
            trained.sae,
            trained.sae_cfg,
            scored.behaviour,
            job.config,
            stream,
            job.files,
            stop,
            calls,
        )
    headline = {} if results.analysis is None else results.analysis.headline
    # Without the analysis itself: the jobs of a bank wait for each other with what they hold.
    return Examined(job, trained, results._replace(analysis=None), headline, seconds)


def finish(
    stream: Stream,
    started: float,
    spent: Callable[[], dict[str, Any]],
    examined: Examined,
) -> None:
    """The last files and the pages. `spent` says where the time went until it is called."""
    job, trained, tracker = examined.job, examined.trained, examined.trained.tracker
    results = examined.results
    tracker.summary(examined.analysis_headline)
    info = _final_info(job.config, trained, stream, results, time.monotonic() - started)
    info["seconds"] = spent()
    tracker.summary(results.evaluation.headline)
    tracker.summary({f"eval/{name}": found["value"] for name, found in results.meaning.items()})
    write_json(job.files.final_info, info)
    run = job.files.load()
    with stage("pages"):
        write_pages(run)
    _send_pages(run, tracker)
    say_results(run, results.evaluation)
    said = spent()
    log.info(f"where the time went: {in_words(said['shared'] | said['own'])}")
    job.let_checkpoints_go()
    job.outcome = Outcome(info)


def _check_content(stream: Stream, files: RunFiles) -> None:
    """Raises UserError if the run was begun with other text or weights under the same paths."""
    known, content = files.content, stream.content
    if files.checkpoints.exists() and known.is_file():
        before = read_json(known)
        changed = [name for name in before if before[name] != content.get(name)]
        if changed:
            raise UserError(
                f"{files.path} was begun with other content ({', '.join(changed)} changed since): "
                "remove it, choose another folder, or restore what was there"
            )
    write_json(known, content)


def _in_windows(config: Config, stream: Stream) -> float:
    """Share of the valid training tokens that a window holds."""
    contexts = stream.train.source.contexts
    return share_in_windows(config.loss_window, contexts.segments, contexts.valid)


def _check_windows(config: Config, stream: Stream) -> None:
    """Raises UserError if no window of the training text could ever have a loss."""
    if not config.has_temporal_loss:
        return
    share = _in_windows(config, stream)
    if share == 0:
        raise UserError(
            f"window = {config.window}: no document of the training text has {in_a_row(config)}, "
            "so that the temporal loss would be 0 at every step: take a smaller window, longer "
            "documents, or consistency=none"
        )
    if few := few_in_windows(config, share):
        log.warning(few)


def _bfloat16_products(config: Config, device: str) -> bool:
    wanted = config.training.precision
    if wanted == "tf32" and not device.startswith("cuda"):
        log.warning(f"training.precision = tf32 is for GPUs: on {device} it is float32")
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
    config: Config,
    trained: Trained,
    stream: Stream,
    results: Results,
    wall_seconds: float,
) -> dict[str, Any]:
    """The keys the experiment's first runs wrote, filled with what happened."""
    return {
        "training_steps": trained.steps,
        "final_loss": trained.final_loss,
        "learning_rate": config.training.lr,
        "sparsity_penalty": getattr(config.sae, "l1_coefficient", None),
        "window_size": config.window,
        "lambda": config.lambda_,
        "seed": config.seed,
        "tokens": trained.tokens,
        "tokens_in_windows": _in_windows(config, stream),
        "held_out_seen_in_training": stream.evaluation.source.contexts.seen,
        "training_seconds": trained.seconds,
        "products": products_for(torch.device(stream.device)).name,
        "tokens_per_second": trained.steps
        * config.training.batch_contexts
        * config.dataset.context_size
        / trained.seconds,
        **measured_info(config, stream, results, wall_seconds),
    }


def _send_pages(run: LoadedRun, tracker: Tracker) -> None:
    """The report's figures and its table of features, to W&B."""
    if tracker.wandb.failed:
        return
    columns = {"feature": list(range(run.config.sae.d_sae)), **run.consistency["per_feature"]}
    tracker.pages(run_figures(Contents.of(run)), columns)
