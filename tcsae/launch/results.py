"""What became of the jobs of a sweep, from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from tcsae.base.files import read_json
from tcsae.launch.jobs import GridJob
from tcsae.runs.state import read_state


@dataclass(frozen=True)
class JobResult:
    job: GridJob
    state: str
    """done, skipped (it was done before), failed, or not finished."""
    message: str = ""
    info: dict[str, Any] | None = None

    @property
    def is_good(self) -> bool:
        return self.state in ("done", "skipped")

    @property
    def value(self) -> float | None:
        """What a sweeper optimises: explained variance."""
        if self.info is None:
            return None
        return self.info["metrics"]["reconstruction_quality"]["explained_variance"]


def results_of(
    jobs: Sequence[GridJob], before: Set[int], said: Mapping[int, str]
) -> list[JobResult]:
    """One result a job; `before` are the numbers of those that were finished already.

    `said`: messages for jobs whose folder does not say why they are not finished.
    """
    return [_result(job, job.number in before, said.get(job.number, "")) for job in jobs]


def _result(job: GridJob, was_done: bool, said: str) -> JobResult:
    if job.is_finished:
        state = "skipped" if was_done else "done"
        return JobResult(job, state, "", read_json(job.files.final_info))
    known = read_state(job.folder)
    if known is not None and known.state == "failed":
        return JobResult(job, "failed", known.message or said)
    return JobResult(job, "failed" if said else "not finished", said or "run the command again")


def table(results: Sequence[JobResult]) -> str:
    """The end of a sweep in a terminal: every job, its figures or why it has none."""
    width = min(max((len(result.job.name) for result in results), default=3), 60)
    lines = [f"{'job':>4}  {'':{width}}  {'state':<12} {'L0':>7} {'EV':>6} {'CE':>6}  C_W"]
    for result in results:
        start = f"{result.job.number:>4}  {_short(result.job.name, width):{width}}  "
        lines.append(start + f"{result.state:<12} " + (_figures(result) or result.message))
    counted = {state: sum(r.state == state for r in results) for state in STATES}
    lines.append(", ".join(f"{n} {state}" for state, n in counted.items() if n))
    for result in results:
        if result.state == "failed" and result.job.files.state.is_file():
            lines.append(f"why: python -m tcsae.status --failed {result.job.folder.parent}")
            break
    return "\n".join(lines)


STATES = ("done", "skipped", "failed", "not finished")


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def _figures(result: JobResult) -> str:
    if result.info is None:
        return ""
    metrics = result.info["metrics"]
    window = result.info["window_size"]
    consistency = result.info["consistency"]["metrics"].get(f"C_{window}")
    shown = []
    if consistency is not None:
        shown.append(f"C_{window} {_number(consistency['energy_weighted'])}")
    if (truth := result.info.get("truth")) is not None:
        shown.append(f"found {_number(truth['all']['found'])}, MCC {_number(truth['mcc'])}")
    return (
        f"{_number(metrics['sparsity']['l0'], 1):>7} "
        f"{_number(metrics['reconstruction_quality']['explained_variance']):>6} "
        f"{_number(metrics['model_performance_preservation']['ce_loss_score']):>6}  "
        f"{', '.join(shown)}"
    )


def _number(value: float | None, digits: int = 3) -> str:
    """n/a for what a run has no value for: of a synthetic world the cross-entropy, say."""
    return "n/a" if value is None else f"{value:.{digits}f}"
