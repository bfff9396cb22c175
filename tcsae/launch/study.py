"""The study of an adaptive sweep: which points Optuna has chosen, and what came of them.

It lies in the sweep's folder as Optuna's journal: lines of JSON, which any number of commands
continue and Optuna's own tools read. Nothing in it is a pickle.

A trial's user attributes: `overrides` (its job's, as a list), `values` (of the objective and of
every constraint, by key), `folder` (the job's, relative), `reason` (why it has no value).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcsae.base.errors import UserError, first_line
from tcsae.base.files import Lock, locked, make_folder
from tcsae.base.run_files import STUDY_FILE, STUDY_LOCK

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

ABOUT = "tcsae"
"""The study's user attribute that says what was asked."""
NAME = "tcsae"


def optuna() -> Any:
    """The library, quiet. Raises UserError without it."""
    try:
        import optuna as library
        from optuna.trial import Trial
    except ImportError:
        raise UserError(
            "hydra/sweeper=optuna needs Optuna 5, which is not installed: pip install "
            "'tcsae[optuna]' (in a clone: pip install -e '.[optuna]')"
        ) from None
    if not hasattr(Trial, "set_constraint"):
        raise UserError(
            f"hydra/sweeper=optuna needs Optuna 5, and {library.__version__} is installed: "
            "pip install 'optuna>=5,<6'"
        )
    library.logging.set_verbosity(library.logging.WARNING)
    warnings.filterwarnings("ignore", category=library.exceptions.ExperimentalWarning)
    return library


@contextmanager
def study_in(folder: Path, direction: str, about: Mapping[str, Any]) -> Iterator[Study]:
    """The study of a sweep's folder, new or continued, for one command at a time.

    Raises UserError if another command holds it, if it asks for something else than `about`, or if
    it cannot be read.
    """
    library = optuna()
    file = make_folder(folder) / STUDY_FILE
    with locked(folder / STUDY_LOCK) as lock:
        if lock is Lock.BUSY:
            raise UserError(f"another command is at work on {file}: wait for its end")
        try:
            study = library.create_study(
                storage=_storage(library, file),
                study_name=NAME,
                direction=direction,
                load_if_exists=True,
            )
            asked = study.user_attrs.get(ABOUT)
            n_trials = len(study.trials)
        except OSError:
            raise
        except Exception as error:  # whatever Optuna makes of a file that is none of its own
            raise UserError(
                f"{file}: Optuna cannot read it ({first_line(error)}); move it away, and the "
                "search begins anew with the jobs that the folder has"
            ) from None
        if asked is None and not n_trials:
            study.set_user_attr(ABOUT, dict(about))
        elif asked != dict(about):
            raise UserError(_differs(file, asked or {}, about))
        yield study


def study_in_memory(direction: str) -> Study:
    study: Study = optuna().create_study(direction=direction)
    return study


def _storage(library: Any, file: Path) -> Any:
    journal = library.storages.journal
    return library.storages.JournalStorage(journal.JournalFileBackend(str(file)))


def _differs(file: Path, asked: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    names = [name for name in about if about[name] != asked.get(name)]
    said = "; ".join(
        f"{name}: {_short(asked.get(name))}, now {_short(about[name])}" for name in names
    )
    return (
        f"{file} is of another search ({said}): a search of its own has a folder of its own, "
        "hydra.sweep.dir=..."
    )


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def seed_sampler(study: Study, seed: int) -> None:
    """A sampler that depends on the seed and on how many points there are, so that a search that
    was continued chooses what one that was not would have."""
    text = f"{seed} {len(study.trials)}".encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
    study.sampler = optuna().samplers.TPESampler(seed=number, constant_liar=True)


def again(study: Study) -> int:
    """Put the points of jobs that failed, or were stopped, before new ones; how many there are."""
    state = optuna().trial.TrialState
    for trial in study.get_trials(states=(state.RUNNING,)):
        study.tell(trial.number, state=state.FAIL)
    known = {
        _point(trial) for trial in study.trials if trial.state == state.WAITING or ended(trial)
    }
    unfinished = [t for t in study.get_trials(states=(state.FAIL,)) if not ended(t)]
    points = {_point(trial): trial.params for trial in unfinished}
    for point, params in points.items():
        if point not in known and params:
            study.enqueue_trial(params, user_attrs={"again": params})
    return len(set(points) - known)


def _point(trial: FrozenTrial) -> str:
    return json.dumps(trial.params or trial.user_attrs.get("again", {}), sort_keys=True)


def ended(trial: FrozenTrial) -> bool:
    """Whether there is nothing more to be done for it: it has a value, or can have none."""
    return trial.state.name == "COMPLETE" or "reason" in trial.user_attrs


def latest(study: Study) -> list[FrozenTrial]:
    """Of every point that was tried again its last trial, and all that ended."""
    trials = [t for t in study.trials if t.state.name != "WAITING" and t.params]
    done = {_point(trial) for trial in trials if ended(trial)}
    last = {_point(trial): trial.number for trial in trials}
    return [
        trial
        for trial in trials
        if ended(trial) or (_point(trial) not in done and last[_point(trial)] == trial.number)
    ]


def tell(study: Study, trial: Trial, value: float, excess: Mapping[str, float]) -> None:
    """`excess`: by how far each constraint is missed; 0 or less where it is kept."""
    for key, by in excess.items():
        trial.set_constraint(key, by)
    study.tell(trial, value)


def tell_none(study: Study, trial: Trial, reason: str | None) -> None:
    """`reason`: why there never will be a value; None for a job that is to be done again."""
    if reason is not None:
        trial.set_user_attr("reason", reason)
    study.tell(trial, state=optuna().trial.TrialState.FAIL)


def is_feasible(trial: FrozenTrial) -> bool:
    return trial.state.name == "COMPLETE" and all(by <= 0 for by in trial.constraints.values())


def best_of(trials: Sequence[FrozenTrial], direction: str) -> FrozenTrial | None:
    """The best that keeps to every constraint; None if none does."""
    feasible = [trial for trial in trials if is_feasible(trial)]
    sign = 1 if direction == "maximize" else -1
    return max(feasible, key=lambda trial: sign * (trial.value or 0.0), default=None)
