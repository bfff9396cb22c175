"""Jobs: their folders, their identity, their stages; one alone, or a bank on one stream.

Stages: contexts -> harvest -> train -> save `sae/` -> evaluate -> analyse -> `final_info.json`,
which marks the run as finished -> the pages made from all that. The same config finds the same
folder: it goes on where it was interrupted, and is not repeated once finished.

The jobs of a bank share the activations and the order of batches, and nothing else: each has its
own folder, checkpoint and W&B run, ends with the very weights it would have alone, and fails alone.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tcsae.base.allocator import keep_large_blocks
from tcsae.base.errors import Interrupted, UserError
from tcsae.base.files import read_json, write_json
from tcsae.base.log import speaking_of
from tcsae.base.progress import Progress, listening
from tcsae.base.run_files import RunFiles
from tcsae.base.signals import StopRequest, stop_on_signal
from tcsae.config import Config
from tcsae.data.language_model import bfloat16_is_native
from tcsae.data.stream import Stream, open_stream
from tcsae.jobs.finish import measure, measured_info, say_results, write_pages
from tcsae.jobs.tracking import Tracker
from tcsae.losses.laplacian import share_in_windows
from tcsae.measure.evaluation import Evaluation, on_the_model
from tcsae.metrics.reconstruction import ModelMetrics
from tcsae.report.contents import Contents
from tcsae.report.run_page import run_figures
from tcsae.runs.folder import LoadedRun, RunFolder
from tcsae.runs.state import StateFile
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.formats.saelens import load_saelens, save_saelens
from tcsae.training.member import Member
from tcsae.training.trainer import Seat, train_bank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a job of a bank ended: with the content of final_info.json, or with an error."""

    info: dict[str, Any] | None = None
    error: Exception | None = None
    repeated: bool = True
    """False: the folder showed it as finished, and nothing was done."""


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Do the job, or what is left of it, in `folder`; the content of final_info.json.

    Raises:
        UserError: what the user can mend, in one line.
        Interrupted: a signal came; calling it again goes on.
    """
    with stop_on_signal() as stop:
        outcome = run_bank([(config, folder)], stop)[0]
    if outcome.error is not None:
        raise outcome.error
    assert outcome.info is not None
    return outcome.info


def run_bank(jobs: Sequence[tuple[Config, Path]], stop: StopRequest) -> list[Outcome]:
    """The jobs side by side on one stream; one outcome a job, in their order.

    They must agree in model, layer, hook, dataset and training.batch_contexts. A job that fails
    leaves the others alone; what they share (the stream) fails them all.

    Raises:
        Interrupted: a signal came; every job has saved, and calling it again goes on.
    """
    bank = [_Job(config, Path(folder)) for config, folder in jobs]
    with contextlib.ExitStack() as held:
        for job in bank:
            with job.guarded():
                job.claim(held)
        waiting = [job for job in bank if job.outcome is None]
        try:
            if waiting:
                _work(waiting, stop)
        except Interrupted:
            raise
        except Exception as error:
            for job in waiting:
                job.fail(error)
        finally:
            for job in waiting:
                job.close()
    return [job.outcome for job in bank if job.outcome is not None]


def _work(bank: list[_Job], stop: StopRequest) -> None:
    started = time.monotonic()
    keep_large_blocks()
    for job in bank:
        job.state.begin()
        job.state.stage("load the model")
    with listening(partial(_tell, bank)):
        stream = open_stream(bank[0].config, stop)
        for job in bank:
            with job.guarded():
                job.begin(stream)
        seats = [job.seat for job in bank if job.seat is not None]
        train_bank(seats, stream.train, stop)
        for job in bank:
            with job.guarded():
                job.keep(stream)
        stop.check()
        _measure_behaviour(bank, stream, stop)
    for index, job in enumerate(bank):
        if len(bank) > 1:
            log.info(f"-- {index + 1} of {len(bank)}: {job.config.name or job.folder.name}")
        with job.guarded(), listening(partial(_tell, bank[index:])):
            job.finish(stream, stop, started)


def _measure_behaviour(bank: Sequence[_Job], stream: Stream, stop: StopRequest) -> None:
    """What the language model does with each SAE in it; its own passes serve all of them."""
    trained = [job for job in bank if job.trained is not None]
    for n_contexts in dict.fromkeys(job.config.evaluation.model_contexts for job in trained):
        jobs = [job for job in trained if job.config.evaluation.model_contexts == n_contexts]
        saes = [job.trained.sae for job in jobs if job.trained is not None]
        found = on_the_model(saes, jobs[0].config, stream.model, stream.evaluation, stop)
        for job, behaviour in zip(jobs, found, strict=True):
            job.behaviour = behaviour


def _tell(bank: Sequence[_Job], progress: Progress) -> None:
    """What the bank does now, into the state files; behind a job's evaluation the others wait."""
    p, shared = progress, progress.what not in OWN_STAGES
    for index, job in enumerate(bank):
        if job.seat is not None and job.seat.error is not None:
            job.fail(job.seat.error)
            job.close()
        elif job.outcome is None and (shared or index == 0):
            job.state.stage(p.what, p.done, p.total, p.unit, p.rate, p.note)
        elif job.outcome is None:
            job.state.stage("waiting for its evaluation")


def _check_content(stream: Stream, files: RunFiles) -> None:
    """Raises UserError if the run was begun with other text or weights under the same paths."""
    known, content = files.content, stream.content
    if files.checkpoints.exists() and known.is_file():
        before = read_json(known)
        changed = [name for name, value in content.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"{files.path} was begun with other content ({', '.join(changed)} changed since): "
                "remove it, choose another folder, or restore what was there"
            )
    write_json(known, content)


FEW_IN_WINDOWS = 0.1
"""Below this share of tokens in windows the temporal loss says little of the text."""


def _check_windows(config: Config, stream: Stream) -> None:
    """Raises UserError if no window of the training text could ever have a loss."""
    if not config.has_temporal_loss:
        return
    window = 2 if config.consistency.form == "slow" else config.window
    contexts = stream.train.source.contexts
    share = share_in_windows(window, contexts.segments, contexts.valid)
    wanted = "two valid tokens" if window == "document" else f"{window} valid tokens in a row"
    if share == 0:
        raise UserError(
            f"window = {window}: no document of the training text has {wanted}, so that the "
            "temporal loss would be 0 at every step: take a smaller window, longer documents, or "
            "consistency=none"
        )
    if share < FEW_IN_WINDOWS:
        log.warning(
            f"window = {window}: only {100 * share:.1f} % of the training tokens lie where a "
            f"document has {wanted}; the temporal loss sees no others"
        )


@dataclass(frozen=True)
class _Trained:
    """What is left of a seat when its training is over."""

    sae: SparseAutoencoder
    """As saved: on raw activations."""
    sae_cfg: dict[str, Any]
    steps: int
    """That the optimizer took."""
    tokens: int
    seconds: float
    final_loss: float


class _Job:
    """One run, from its claim on a folder to its pages."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.files = RunFolder(folder)
        self.state = StateFile(folder)
        self.tracker: Tracker | None = None
        self.seat: Seat | None = None
        self.trained: _Trained | None = None
        self.behaviour: ModelMetrics | None = None
        self.outcome: Outcome | None = None
        self.is_closed = False

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """An error in the block is this job's outcome, and stops nobody else."""
        with speaking_of(self.folder):
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
        if not self.files.is_finished:
            return
        if not self.config.rerun:
            if not self.files.has_pages:
                write_pages(self.files.load())
            log.info(f"already finished: {self.folder} (rerun=true repeats it)")
            self.outcome = Outcome(read_json(self.files.final_info), repeated=False)
            return
        # Checkpoints first: a repetition that is interrupted must go on, not start again.
        shutil.rmtree(self.files.checkpoints, ignore_errors=True)
        self.files.final_info.unlink()

    def begin(self, stream: Stream) -> None:
        _check_content(stream, self.files)
        _check_windows(self.config, stream)
        torch.manual_seed(self.config.seed)
        self.tracker = Tracker(self.config, self.folder)
        member = Member(
            self.config,
            stream.model.d_in,
            stream.train.calibration,
            stream.model.device,
            autocast=_bfloat16_products(self.config, stream.model.device),
        )
        self.seat = Seat(member, self.folder, self.tracker)

    def keep(self, stream: Stream) -> None:
        """Save the trained SAE and let go of its optimizer, unless the job has failed.

        Raises RuntimeError for a run without an optimizer step: there is no result to report.
        """
        if self.outcome is not None:
            return
        assert self.seat is not None
        if self.seat.error is not None:
            raise self.seat.error
        member = self.seat.member
        if member.optimizer_steps < 1:
            raise RuntimeError("the optimizer took no step: there is nothing to report")
        metadata = _saelens_metadata(self.config, stream)
        save_saelens(self.files.sae, member.finished_sae(), metadata)
        sae, sae_cfg = load_saelens(self.files.sae)
        self.trained = _Trained(
            sae,
            sae_cfg,
            steps=member.optimizer_steps,
            tokens=int(member.tokens_seen),
            seconds=self.seat.seconds,
            final_loss=member.last_loss.item(),
        )
        self.seat = None

    def finish(self, stream: Stream, stop: StopRequest, started: float) -> None:
        """From the trained SAE to the pages, unless the job has failed."""
        if self.outcome is not None:
            return
        assert self.trained is not None and self.behaviour is not None
        assert self.tracker is not None
        stop.check()
        evaluation = self._measure(stream, stop, self.trained, self.behaviour)
        info = _final_info(
            self.config, self.trained, stream, evaluation, time.monotonic() - started
        )
        self.tracker.summary(evaluation.headline)
        write_json(self.files.final_info, info)
        run = self.files.load()
        write_pages(run)
        _send_pages(run, self.tracker)
        say_results(self.files, evaluation)
        self.outcome = Outcome(info)
        self.close()

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
            self.state.end("failed", _first_line(error), "".join(traceback.format_exception(error)))
        if self.tracker is not None:
            self.tracker.finish(int(self.outcome is None or error is not None))
        # A bank's memory is given back job by job.
        self.tracker = self.seat = self.trained = self.behaviour = None

    def _measure(
        self, stream: Stream, stop: StopRequest, trained: _Trained, behaviour: ModelMetrics
    ) -> Evaluation:
        """What was saved, measured: `eval/` and `analysis/`."""
        evaluation, analysis = measure(
            trained.sae, trained.sae_cfg, behaviour, self.config, stream, self.files, stop
        )
        if analysis is not None:
            assert self.tracker is not None
            self.tracker.summary(analysis.headline)
        return evaluation


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


OWN_STAGES = ("evaluate features", "analyse features")
"""Names of the progress that one job of a bank makes while the others wait."""


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
    config: Config,
    trained: _Trained,
    stream: Stream,
    evaluation: Evaluation,
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
        "training_seconds": trained.seconds,
        "tokens_per_second": trained.steps
        * config.training.batch_contexts
        * config.dataset.context_size
        / trained.seconds,
        **measured_info(config, stream, evaluation, wall_seconds),
    }


def _send_pages(run: LoadedRun, tracker: Tracker) -> None:
    """The report's figures and its table of features, to W&B."""
    if tracker.wandb.failed:
        return
    columns = {"feature": list(range(run.config.sae.d_sae)), **run.consistency["per_feature"]}
    tracker.pages(run_figures(Contents.of(run)), columns)
