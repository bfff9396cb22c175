"""A run in Weights & Biases: it goes on under its id, and W&B never stops or delays a training."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tcsae.base.errors import UserError
from tcsae.base.files import read_json, write_json
from tcsae.base.run_files import RunFiles
from tcsae.config import TrackingConfig
from tcsae.config.run import WANDB_REFUSES

log = logging.getLogger(__name__)

STEP = "training_step"
"""The metric that all others are drawn over."""

_LIMIT = 128
"""Characters in W&B's names of projects and groups."""
_START_SECONDS = 25
"""How long an online start is waited for; a run whose id was deleted has two of them."""
_FINISH_SECONDS = 300
_QUIET_SECONDS = 600
"""How long after a failed start the other runs of the process do not try."""
_DELETED = "previously created and deleted"
"""W&B's words for an id that can never be used again."""

_last_failure: tuple[float, str] | None = None
"""When an online start failed in this process, and why: the jobs of a bank are many runs."""
_alive: set[str] = set()
"""The ids of this process' runs that have not finished."""


# -------------------------------------------------------------------------------- environment


def check_environment(tracking: TrackingConfig, name: str | None) -> None:
    """Say in one line which of W&B's variables the config decides instead, so that the same command
    means the same everywhere.

    Args:
        tracking: the job's.
        name: the config's own name of the run, if it has one.

    Raises:
        UserError: W&B would refuse a name that it takes from the environment.
    """
    if tracking.mode == "disabled":
        return
    for variable, own in (("WANDB_ENTITY", tracking.entity), ("WANDB_RUN_GROUP", tracking.group)):
        _check_name(variable, "" if own else os.environ.get(variable, ""))
    if other := _without_effect(tracking, name):
        log.warning(f"without effect in the environment: {', '.join(other)}")


def _check_name(variable: str, value: str) -> None:
    if bad := sorted(set(value) & WANDB_REFUSES) if variable == "WANDB_ENTITY" else []:
        raise UserError(f"{variable} = {value}: W&B takes no {' '.join(bad)} in a name")
    if len(value) > _LIMIT:
        raise UserError(f"{variable} = {value}: W&B takes at most {_LIMIT} characters")


def _without_effect(tracking: TrackingConfig, name: str | None) -> list[str]:
    keys = {
        "WANDB_MODE": ("tracking.mode", tracking.mode),
        "WANDB_DISABLED": ("tracking=disabled", ""),
        "WANDB_PROJECT": ("tracking.project", tracking.project),
        "WANDB_ENTITY": ("tracking.entity", tracking.entity),
        "WANDB_NAME": ("name", name),
        "WANDB_TAGS": ("tracking.tags", ",".join(tracking.tags)),
        "WANDB_RUN_GROUP": ("tracking.group", tracking.group),
        "WANDB_RUN_ID": ("the hash of the configuration", ""),
        "WANDB_RESUME": ("the run's folder", "allow"),
        "WANDB_DIR": ("the run's folder", ""),
        "WANDB_JOB_TYPE": ("the command", ""),
    }
    # Where these keys are null the client itself takes the environment's.
    obeyed = ("tracking.entity", "tracking.group")
    return [
        f"{variable}={asked} ({key} does it)"
        for variable, (key, value) in keys.items()
        if (asked := os.environ.get(variable)) and asked != value and (value or key not in obeyed)
    ]


# ------------------------------------------------------------------------------------ the run


class WandbRun:
    """A W&B run that goes on under its id after a restart. Its first failure is one warning, after
    which it does nothing.

    An online start that fails is an offline one: the run is in its folder, for `wandb sync`. If its
    id was deleted in W&B, the run has a new one from then on.

    Args:
        tracking: mode, project, entity, group.
        folder: W&B writes to `wandb/` in it.
        about: id, name, job_type, tags, config: as in `wandb.init`.
    """

    def __init__(self, tracking: TrackingConfig, folder: Path, **about: Any) -> None:
        self.tracking, self.folder = tracking, Path(folder)
        self.mode = tracking.mode
        self.about = about
        self.run: Any = None
        self.failed = self.mode == "disabled"
        self.id = self._known_ids().get(self._place, about["id"])
        # W&B's own record of what earlier starts logged: it has all of it if all were offline.
        self._is_whole = self._earlier_are_offline()
        self._is_begun = False
        self.attempt(self._start)

    # ---- its id

    @property
    def _place(self) -> str:
        entity = self.tracking.entity or os.environ.get("WANDB_ENTITY", "")
        return f"{entity}/{self.tracking.project}"

    def _known_ids(self) -> dict[str, str]:
        """The ids that were taken in place of deleted ones, by entity and project."""
        known = RunFiles(self.folder).wandb_ids
        return read_json(known) if known.is_file() else {}

    def _take_new_id(self, why: str) -> None:
        before, self.id = self.id, f"{self.about['id']}-{secrets.token_hex(2)}"
        write_json(RunFiles(self.folder).wandb_ids, self._known_ids() | {self._place: self.id})
        log.warning(f"the W&B run {before} {why}: this run is {self.id} there from now on")

    def _earlier_are_offline(self) -> bool:
        sessions = [path.name for path in (self.folder / "wandb").glob("*run-*")]
        mine = [name for name in sessions if name.endswith(f"-{self.id}")]
        return bool(mine) and all(name.startswith("offline-") for name in mine)

    # ---- its start

    def _start(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        if self.mode == "online":
            self._start_online()
        else:
            self._init()
        self.run.define_metric("*", step_metric=STEP)

    def _start_online(self) -> None:
        global _last_failure
        now = time.monotonic()
        if _last_failure and now - _last_failure[0] < _QUIET_SECONDS:
            why = _last_failure[1]
        else:
            try:
                self._try_online()
                return
            except Exception as error:
                why = _in_words(error)
                _last_failure = (now, why)
        self.mode = "offline"
        self._free_id()
        self._init()
        log.warning(
            f"no W&B online ({why}): this run is recorded offline, whole; with a network, "
            f"`wandb sync {self._sessions}` sends it"
        )

    def _try_online(self) -> None:
        import wandb

        # Asked first: at a terminal wandb.init would prompt for a key, and its process keeps the id
        # of a start that failed.
        if not wandb.login(prompt=False, verify=True):
            raise UserError("no login: `wandb login` makes one")
        try:
            self._init()
        except Exception as error:
            if _DELETED not in str(error):
                raise
            self._take_new_id("was deleted there, and its id cannot be used again")
            self._init()

    def _free_id(self) -> None:
        """W&B's process keeps the id of a start that failed, and does not give it up while it
        lives."""
        import wandb

        if not self._is_begun:
            return
        if wandb.run is None and not _alive:
            wandb.teardown()
        else:
            self._take_new_id("was begun in vain, and others go on beside it")

    def _init(self) -> None:
        import wandb

        self._is_begun = True
        self.run = wandb.init(
            mode=self.mode,
            project=self.tracking.project,
            entity=self.tracking.entity,
            group=self.tracking.group,
            resume="allow",
            dir=self.folder,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=_START_SECONDS,
                # Without a network, W&B would wait for it for ever; `wandb sync` sends the rest.
                finish_timeout=_FINISH_SECONDS,
                finish_timeout_raises=True,
                # The runs of a bank live in one process.
                reinit="create_new",
            ),
            **self.about | {"id": self.id},
        )
        _alive.add(self.id)

    @property
    def _sessions(self) -> str:
        """W&B's folder, as a shell takes it."""
        return shlex.quote(str((self.folder / "wandb").resolve()))

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log what W&B has not got of an earlier start that was killed, offline or had another id.

        Args:
            rows: lines of metrics.jsonl up to the step that the run goes on from.
        """
        if self.failed or (self.mode == "offline" and self._is_whole):
            return
        for row in rows:
            values = {k: v for k, v in row.items() if k != "step" and v is not None}
            if row["step"] >= self.run.starting_step:
                self.log(values, row["step"])

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do something with W&B; a failure of it is the warning."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            log.warning(f"W&B is off for the rest of this run ({_in_words(error)})")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """A row of the history. W&B drops one whose step it has or has passed: what a restarted
        run repeats is the same."""
        self.attempt(lambda: self.run.log({STEP: step, **values}, step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.attempt(lambda: self.run.summary.update(values))

    def pages(
        self,
        figures: Mapping[str, Any],
        tables: Mapping[str, Mapping[str, Sequence[Any]]],
        step: int,
    ) -> None:
        """Plotly figures, and tables given by their columns, all by their names in W&B."""
        self.attempt(lambda: self._send_pages(figures, tables, step))

    def _send_pages(
        self,
        figures: Mapping[str, Any],
        tables: Mapping[str, Mapping[str, Sequence[Any]]],
        step: int,
    ) -> None:
        import wandb

        sent: dict[str, Any] = {name: wandb.Plotly(figure) for name, figure in figures.items()}
        for name, columns in tables.items():
            rows = [list(row) for row in zip(*columns.values(), strict=True)]
            sent[name] = wandb.Table(columns=list(columns), data=rows)
        with self._staging():
            self.run.log({STEP: step, **sent}, step=step)

    @contextlib.contextmanager
    def _staging(self) -> Iterator[None]:
        """W&B copies a table to the home folder of the machine that made it, where `wandb sync` on
        another one does not find it; here, to the run's own folder."""
        name = "WANDB_DATA_DIR"
        if name in os.environ:
            yield
            return
        os.environ[name] = str((self.folder / "wandb").resolve())
        try:
            yield
        finally:
            del os.environ[name]

    def artifact(
        self, kind: str, folder: Path, patterns: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        """Files of `folder` as the artifact `<kind>-<run id>`, once for each content."""
        self.attempt(lambda: self._send_artifact(kind, folder, patterns, metadata))

    def _send_artifact(
        self, kind: str, folder: Path, patterns: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        import wandb

        name = f"{kind}-{self.id}"
        artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata))
        files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        for path in files:
            # Not copied: an SAE may have gigabytes, and nothing changes it here.
            artifact.add_file(
                str(path.resolve()),
                name=path.relative_to(folder).as_posix(),
                policy="immutable",
                skip_cache=True,
            )
        known = self.folder / "wandb" / "artifacts.json"
        sent = read_json(known) if known.is_file() else {}
        place = f"{self.mode} {self.tracking.entity}/{self.tracking.project}/{name}"
        if files and sent.get(place) != artifact.digest:
            self.run.log_artifact(artifact)
            write_json(known, sent | {place: artifact.digest})

    def finish(self, exit_code: int) -> None:
        self.attempt(lambda: self._finish(exit_code))

    def _finish(self, exit_code: int) -> None:
        _alive.discard(self.id)
        try:
            self.run.finish(exit_code=exit_code)
        except TimeoutError:
            log.warning(
                f"W&B has not got all of this run within {_FINISH_SECONDS} s: with a network, "
                f"`wandb sync --include-online {self._sessions}` sends the rest"
            )


def _in_words(error: Exception) -> str:
    # Without the client's advice to wait longer.
    said = str(error).partition("Consider increasing")[0]
    return " ".join(f"{type(error).__name__}: {said}".split())
