"""One run over several ranks: the first has its folder, the others harvest and train along."""

from __future__ import annotations

from pathlib import Path

from tcsae.base.ranks import Group
from tcsae.base.run_files import RunFiles
from tcsae.base.signals import StopRequest
from tcsae.config import Config
from tcsae.data.stream import open_stream
from tcsae.jobs.job import new_member
from tcsae.training.share import Share
from tcsae.training.trainer import Seat, train_bank


class _Unseen:
    """The metrics of a rank that writes none."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        return

    def rewind(self, step: int) -> None:
        return


def shared(config: Config, folder: Path, ranks: Group) -> Share | None:
    """This rank's share of a run's training; None if the first one finds the run finished."""
    is_done = RunFiles(folder).is_finished and not config.rerun
    return None if ranks.exchange(is_done)[0] else Share.over(ranks)


def train_along(config: Config, folder: Path, share: Share, stop: StopRequest) -> None:
    """What every rank but the first does: nothing of it is written but shards of the store.

    Raises:
        UserError: what the user can mend, in one line.
        Interrupted: a signal came, or another rank is gone; the same command goes on.
    """
    stream = open_stream(config, stop)
    seat = Seat(new_member(config, stream), folder, _Unseen(), writes=False)
    train_bank([seat], stream.train, stop, share)
    if seat.error is not None:
        raise seat.error
