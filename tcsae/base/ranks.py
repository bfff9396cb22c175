"""Several processes ("ranks") for one command, as torchrun or Slurm's srun starts them.

Who is who comes from the environment. They meet in a key-value store of torch.distributed, which
they need for words alone: what a rank has to do it reads from files. Every rank says each second
that it is there, and looks at the others: when one is gone, the rest save and stop, so that nobody
waits for ever. One process alone has none of this, and pays nothing for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tcsae.base.errors import (
    INTERRUPTED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    Interrupted,
    UserError,
    first_line,
)

log = logging.getLogger(__name__)

JOIN_SECONDS = 300.0
"""That the ranks may come apart: imports from a disk that many nodes share."""
SILENT_SECONDS = 180.0
"""Without a word after which a rank of another machine is taken for dead; on one machine its
process is looked at instead."""
LOOK_EVERY = 1.0


@dataclass(frozen=True)
class Place:
    """Which of how many this process is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of its machine."""
    host: str = ""
    port: int = 0
    """Where the ranks meet."""
    hosts_store: bool = False
    """Whether this process keeps the meeting place; torchrun has one of its own."""
    has_own_gpu: bool = False
    """Whether Slurm shows every task its own GPUs alone."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


ALONE = Place()
STOPPED = "(stopped)"
"""The end of what a rank says that ends because it was told to."""


def place_of(environ: Mapping[str, str]) -> Place:
    """As torchrun says it, else srun; one process alone if neither does.

    A batch script of Slurm without srun is one process, however many tasks were asked for.

    Raises UserError for an environment that says only half of it.
    """
    if "WORLD_SIZE" in environ:
        size, rank = environ["WORLD_SIZE"], environ.get("RANK", environ.get("SLURM_PROCID"))
        local = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID"))
    else:
        size, rank = environ.get("SLURM_STEP_NUM_TASKS", "1"), environ.get("SLURM_PROCID")
        local = environ.get("SLURM_LOCALID")
    if size == "1":
        return ALONE
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if "WORLD_SIZE" not in environ:
        host, port = host or _first_node(environ), port or str(_port_of(environ))
    known = {"RANK": rank, "LOCAL_RANK": local, "MASTER_ADDR": host, "MASTER_PORT": port}
    if missing := [name for name, value in known.items() if not value]:
        raise UserError(
            f"WORLD_SIZE = {size} without {', '.join(missing)}: start the ranks with torchrun "
            "(torchrun --nproc-per-node 2 -m tcsae.train ...) or srun, or unset WORLD_SIZE"
        )
    numbers = _numbers(WORLD_SIZE=size, RANK=rank, LOCAL_RANK=local, MASTER_PORT=port)
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UserError(f"RANK = {rank} with WORLD_SIZE = {size}: ranks count from 0")
    return Place(
        rank=numbers["RANK"],
        size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        host=str(host),
        port=numbers["MASTER_PORT"],
        hosts_store=rank == "0" and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        has_own_gpu="SLURM_GPUS_PER_TASK" in environ or "SLURM_TRES_PER_TASK" in environ,
    )


def _numbers(**given: str | None) -> dict[str, int]:
    for name, text in given.items():
        if text is None or not text.isdecimal():
            raise UserError(f"{name} = {text}: must be a whole number")
    return {name: int(str(text)) for name, text in given.items()}


def _first_node(environ: Mapping[str, str]) -> str:
    """Of a list as Slurm writes it: node007 of node[007-009,12],other3."""
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _port_of(environ: Mapping[str, str]) -> int:
    """One that another step of this machine hardly has."""
    mixed = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    return 20_000 + int.from_bytes(hashlib.sha256(mixed.encode()).digest()[:4], "big") % 20_000


_place = ALONE
_gpus_there: list[str] = []


def here() -> Place:
    """The place of this process: ALONE but in a command that has called `begin`."""
    return _place


def begin(environ: Any = os.environ, devices: Path = Path("/dev")) -> None:
    """Read the place of this process and, where there are GPUs, show it one of them alone, before
    torch looks: "cuda" then means that one, in every thread.

    Raises UserError as `place_of`.
    """
    global _place, _gpus_there
    _place = place = place_of(environ)
    _gpus_there = visible_gpus(environ, devices) if place.size > 1 else []
    if place.size > 1 and not place.has_own_gpu and place.local_rank < len(_gpus_there):
        environ["CUDA_VISIBLE_DEVICES"] = _gpus_there[place.local_rank]


# ------------------------------------------------------------------------------------- GPUs


def visible_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    there = sorted(int(m[1]) for d in devices.glob("nvidia*") if (m := _GPU.fullmatch(d.name)))
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not there:
        return [str(number) for number in there]
    return [name.strip() for name in chosen.split(",") if name.strip()]


_GPU = re.compile(r"nvidia(\d+)")


def gpu_problem() -> str | None:
    """Why this rank has no GPU of its own; None where it has, or where there is none at all."""
    place, gpus = _place, _gpus_there
    if place.has_own_gpu or not gpus or place.local_rank < len(gpus):
        return None
    some = "1 GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
    return (
        f"rank {place.rank} is number {place.local_rank + 1} on its machine, which shows {some}: "
        f"start at most {len(gpus)} a machine (torchrun --nproc-per-node {len(gpus)}), ask for "
        "more GPUs, or take model.device=cpu (and training.device=null)"
    )


# ------------------------------------------------------------------------------------- meeting


class Group:
    """The ranks of one command, met.

    Args:
        place: of this process.
        join_seconds: within which all must have come, or answered.
        on_loss: called once, from another thread, when a rank is gone.
    """

    def __init__(
        self,
        place: Place,
        join_seconds: float = JOIN_SECONDS,
        on_loss: Callable[[], None] | None = None,
    ) -> None:
        self.place, self.join_seconds = place, join_seconds
        self._on_loss = on_loss or self._stop
        self._prefix = f"tcsae/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._round = 0
        self._left = threading.Event()
        self._beats: dict[int, tuple[int, float]] = {}
        self.lost: str | None = None
        """What there is to say of the first rank that was found gone."""
        self.is_refused = False
        self.store = self._meet()
        self._put("process", {"host": socket.gethostname(), "space": _space(), "pid": os.getpid()})
        self._put("beat", 0)
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    def _meet(self) -> Any:
        from torch.distributed import TCPStore

        place = self.place
        try:
            return TCPStore(
                place.host,
                place.port,
                None,
                place.hosts_store,
                timedelta(seconds=self.join_seconds),
                wait_for_workers=False,
            )
        except Exception as error:  # torch has a type of its own for each way to fail
            raise UserError(
                f"rank {place.rank} does not reach the meeting place {place.host}:{place.port} "
                f"({first_line(error)[:200]}): MASTER_ADDR must be rank 0's machine, and "
                "MASTER_PORT free there"
            ) from None

    # ---- words ----

    def _key(self, what: str, rank: int) -> str:
        return f"{self._prefix}/{what}/{rank}"

    def _put(self, what: str, content: Any) -> None:
        self.store.set(self._key(what, self.place.rank), json.dumps(content))

    def _got(self, what: str, rank: int) -> Any:
        """What that rank said, or None so far."""
        key = self._key(what, rank)
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.place.size) if rank != self.place.rank]

    def exchange(
        self,
        content: Any,
        seconds: float | None = None,
        check: Callable[[], None] | None = None,
    ) -> list[Any]:
        """What every rank gives in its call of the same number, by rank.

        Waits for all: `seconds` at most, or as long as all of them live. `check` may raise.

        Raises:
            UserError: one did not come in time.
            Interrupted: one is gone.
        """
        self._round += 1
        what, until = f"said/{self._round}", time.monotonic() + (seconds or float("inf"))
        self._put(what, [content])
        found: dict[int, Any] = {}
        pause = 0.01
        while len(found) < self.place.size:
            for rank in sorted(set(range(self.place.size)) - found.keys()):
                said = self._got(what, rank)
                if said is not None:
                    found[rank] = said[0]
            waited_for = sorted(set(range(self.place.size)) - found.keys())
            if waited_for and self.lost is not None:
                raise Interrupted("stopped with the other ranks, what was done is saved")
            if check is not None:
                check()
            if waited_for and time.monotonic() > until:
                raise UserError(
                    f"rank {waited_for[0]} of {self.place.size} did not come within "
                    f"{seconds:.0f} s: its own log says why"
                )
            if waited_for:
                time.sleep(pause)
                pause = min(2 * pause, LOOK_EVERY / 2)
        return [found[rank] for rank in range(self.place.size)]

    def agree(self, facts: Mapping[str, str], problem: str | None = None) -> None:
        """Refuse, in one line of one rank, if the ranks differ in `facts` or one has a problem."""
        said = self.exchange([dict(facts), problem], self.join_seconds)
        line = next((p for _, p in said if p), None) or _difference([f for f, _ in said])
        if line is None:
            return
        self._left.set()  # all end, and none of them is to be called lost
        self.is_refused = True
        if self.place.is_first:
            raise UserError(line)
        # torchrun ends all of them as soon as one has ended: the first one is to speak before.
        until = time.monotonic() + 5
        while time.monotonic() < until and not self._got("failed", 0):
            time.sleep(0.05)
        sys.exit(USER_ERROR_EXIT_CODE)

    # ---- who is there ----

    def _watch(self) -> None:
        count = 0
        while not self._left.wait(LOOK_EVERY):
            count += 1
            try:
                self._put("beat", count)
                lost = self.gone()
            except Exception:  # of the connection; torch has several types for it
                lost = "the meeting place of the ranks is gone, and so is the process that kept it"
            if lost and not self._left.is_set():
                self.lost = lost
                self._on_loss()
                return

    def _stop(self) -> None:
        """Ask this process to save and stop; where it has nothing to save yet, it ends at once."""
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, None):
            say_lost(self)
            os._exit(INTERRUPTED_EXIT_CODE)
        os.kill(os.getpid(), signal.SIGTERM)

    def gone(self) -> str | None:
        """What there is to say of a rank that ended before its work did; None if all are well.

        Of several that of the first cause, not of those that stopped for its sake.
        """
        found = [said for rank in self.others if (said := self._end_of(rank))]
        return next((s for s in found if not s.endswith(STOPPED)), found[0] if found else None)

    def _end_of(self, rank: int) -> str | None:
        if self._got("left", rank):
            return None
        if failed := self._got("failed", rank):
            return f"rank {rank} of {self.place.size} ended: {failed}"
        if self._is_dead(rank):
            return (
                f"rank {rank} of {self.place.size} is gone: its process died without a word "
                "(killed, or out of memory?)"
            )
        return None

    def is_first_to_say(self) -> bool:
        """True in one of the ranks."""
        return self.store.add(f"{self._prefix}/said", 1) == 1

    def _is_dead(self, rank: int) -> bool:
        process, beat = self._got("process", rank), self._got("beat", rank)
        if process is None or beat is None:
            return False  # has not come yet
        if process["host"] == socket.gethostname() and process["space"] == _space() is not None:
            return not _is_running(process["pid"])
        before, since = self._beats.get(rank, (-1, 0.0))
        if beat != before:
            self._beats[rank] = beat, time.monotonic()
            return False
        return time.monotonic() - since > SILENT_SECONDS

    def leave(self, error: str | None = None) -> None:
        """Say that this rank has done its part, or why it ends before; the last word."""
        self._left.set()
        with contextlib.suppress(Exception):  # the meeting place may be gone
            if error is None:
                self._put("left", True)
            else:
                self._put("failed", error)
            if self.place.hosts_store:
                self._wait_for_leave(3 * LOOK_EVERY if error else self.join_seconds)

    def _wait_for_leave(self, seconds: float) -> None:
        """The meeting place goes with its process, which so leaves last."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(
            self._got("left", r) or self._got("failed", r) or self._is_dead(r) for r in self.others
        ):
            time.sleep(0.05)


def _space() -> str | None:
    """Of process numbers: two containers of one machine have two. None where that is not known."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _difference(facts: list[dict[str, str]]) -> str | None:
    for name, first in facts[0].items():
        for rank, other in enumerate(facts):
            if other.get(name) != first:
                return (
                    f"the ranks disagree in {name}: rank 0 has {first}, rank {rank} has "
                    f"{other.get(name)}: start all of them with one command, in one checkout and "
                    "one environment"
                )
    return None


# ------------------------------------------------------------------------------ of this process

_group: Group | None = None


def join() -> Group | None:
    """The group of this command's ranks, met at the first call; None for a process alone."""
    global _group
    if _group is None and here().size > 1:
        _group = Group(here())
    return _group


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Around the whole command: however the block ends, the other ranks hear of it."""
    global _group
    try:
        yield
    except BaseException as error:
        if _group is not None:
            group, _group = _group, None
            if not group.is_refused:
                say_lost(group)
            group.leave(_in_words(error))
        raise
    if _group is not None:
        group, _group = _group, None
        group.leave()


def say_lost(group: Group) -> None:
    """One line, of one rank: torchrun's own signal may have been faster than a look."""
    lost = group.lost
    with contextlib.suppress(Exception):  # the meeting place may be gone
        lost = group.gone() or lost
        if lost is not None and not group.is_first_to_say():
            return
    if lost is not None and not lost.endswith(STOPPED):
        log.error(f"{lost}; the other ranks save and stop; the same command goes on from here")


def _in_words(error: BaseException) -> str:
    if isinstance(error, Interrupted):
        return f"{first_line(error)} {STOPPED}"
    if isinstance(error, SystemExit):
        return f"exit code {error.code} {STOPPED}"
    return first_line(error)


@functools.cache
def code_digest() -> str:
    """Of this package's own code and of torch's version."""
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
