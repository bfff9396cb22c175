"""What every finished run holds, whether its SAE was trained there or loaded: results and words."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from tcsae.base.allocator import give_back
from tcsae.base.apart import Calls, here
from tcsae.base.json_numbers import plain
from tcsae.base.run_files import RunFiles
from tcsae.base.signals import StopRequest
from tcsae.config import Config, LoadedConfig, Measured, run_id
from tcsae.data.stream import Stream
from tcsae.meaning.held_text import HeldText
from tcsae.meaning.measured import headlines, measure_meaning, write_meaning
from tcsae.measure.analysis import Analysis, analyse
from tcsae.measure.evaluation import Evaluation, evaluate
from tcsae.metrics.reconstruction import ModelMetrics
from tcsae.report.notes import write_run_notes
from tcsae.report.origin import origin
from tcsae.report.run_page import write_run_page
from tcsae.runs.folder import LoadedRun, RunFolder
from tcsae.sae.base import SparseAutoencoder

log = logging.getLogger(__name__)


class Results(NamedTuple):
    """What `measure` wrote."""

    evaluation: Evaluation
    analysis: Analysis | None
    meaning: dict[str, Any]
    """{name: {value, interval}} of the instruments' headlines; empty without any."""


def measure(
    sae: SparseAutoencoder,
    sae_cfg: dict[str, Any],
    behaviour: ModelMetrics,
    config: Measured,
    stream: Stream,
    files: RunFiles,
    stop: StopRequest,
    calls: Calls = here,
) -> Results:
    """Write `eval/` and, if the config asks for it, `analysis/` of the SAE that is saved there.

    `behaviour` and `sae_cfg` as of `evaluate`, `calls` as of `analyse`; in a thread beside others
    where `stream.is_in_memory`. Raises Interrupted if a signal comes.
    """
    model, held_out = stream.model, stream.evaluation
    give_back()
    evaluation = evaluate(sae, config, model, held_out, stop, sae_cfg, behaviour)
    evaluation.write(files.eval.path)
    meaning = _meaning(sae, config, stream, files, stop)
    if not config.evaluation.analysis:
        return Results(evaluation, None, meaning)
    give_back()
    per_feature, max_lag = evaluation.per_feature, config.evaluation.redundancy_max_lag
    analysis = analyse(
        sae, config, model, held_out, per_feature, stop, max_lag, stream.passage, calls
    )
    analysis.write(files.analysis.path)
    return Results(evaluation, analysis, meaning)


def _meaning(
    sae: SparseAutoencoder, config: Measured, stream: Stream, files: RunFiles, stop: StopRequest
) -> dict[str, Any]:
    # What an earlier attempt at the run found is of other weights.
    files.eval.meaning.unlink(missing_ok=True)
    if not config.evaluation.meaning:
        return {}
    give_back()
    with stream.one_by_one:  # the runs of a bank share what is of the text alone
        text = stream.kept.setdefault("meaning", HeldText(stream.model, stream.evaluation, stop))
        return headlines(write_meaning(files.eval.path, measure_meaning(sae, text, config)))


def measured_info(
    config: Config | LoadedConfig, stream: Stream, results: Results, wall_seconds: float
) -> dict[str, Any]:
    """The part of final_info.json that does not depend on where the SAE comes from."""
    evaluation = results.evaluation
    extras = evaluation.core["eval_result_unstructured"]
    return {
        "layer": stream.model.layer,
        "dict_size": config.sae.d_sae,
        "wall_seconds": wall_seconds,
        "devices": {"model": stream.model.device, "sae": stream.device},
        "model_checks": stream.model.checks,
        "norm_limit": plain(stream.train.calibration.norm_limit),
        "massive_token_share": stream.train.calibration.massive_share,
        "explained_variance_by_norm_limit": extras["explained_variance_by_norm_limit"],
        "unique_id": run_id(config),
        "sae_set": f"tcsae/{config.model.name}/{config.dataset.name}",
        "sae_id": f"{stream.model.hook_name}/{config.sae.architecture}/{run_id(config)}",
        "eval_cfg": config.evaluation.model_dump(mode="json"),
        "metrics": evaluation.core["eval_result_metrics"],
        "consistency": evaluation.consistency["summary"],
        **({} if evaluation.truth is None else {"truth": evaluation.truth.summary}),
        **({"meaning": results.meaning} if results.meaning else {}),
    }


def write_pages(run: LoadedRun) -> None:
    """report.html and notes.txt of a finished run. Whoever needs the run again has it loaded."""
    files = RunFiles(run.folder)
    write_run_page(run, files.report)
    write_run_notes(run, files.notes)


def say_finished(run: RunFolder) -> None:
    """Of a run that is not repeated; pages that were not written are."""
    if not run.has_pages:
        write_pages(run.load())
    log.info(f"already finished: {run.path} (rerun=true repeats it)")


def say_results(run: LoadedRun, evaluation: Evaluation) -> None:
    files = RunFiles(run.folder)
    log.info("held-out results:")
    for line in evaluation.lines():
        log.info(f"  {line}")
    say_norm_limit(evaluation)
    for line in origin(run).first:
        log.warning(line)
    log.info(f"the report: {files.report}")


def say_norm_limit(evaluation: Evaluation) -> None:
    """A warning where the run's own number is in doubt, and not only what it may be laid beside."""
    if said := evaluation.core["eval_result_unstructured"]["norm_limit_caution"]:
        log.log(logging.WARNING if said["decides_the_headline"] else logging.INFO, said["text"])
