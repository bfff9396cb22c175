"""The default launcher: the packs one after the other, in this process.

Where torchrun or srun has started several (tcsae/base/ranks.py), each of these does its share of
the packs, from the store that they fill together.
"""

from __future__ import annotations

import logging
import sys

from tcsae.base.errors import INTERRUPTED_EXIT_CODE, Interrupted
from tcsae.base.ranks import here, join
from tcsae.base.signals import stop_on_signal
from tcsae.config.launcher import Options, checked
from tcsae.launch.closing import write_sweep_page
from tcsae.launch.launcher import GridLauncher, Packs
from tcsae.launch.sweep_folder import SweepFolder
from tcsae.launch.worker import work

log = logging.getLogger(__name__)


class HereLauncher(GridLauncher):
    kind = "here"

    @property
    def options(self) -> Options:
        return checked(Options, self.given)

    def processes(self) -> int | None:
        return here().size

    def execute(self, sweep: SweepFolder, packs: Packs) -> dict[int, str]:
        place, group = here(), join()
        if place.is_first:
            sweep.add_submission(packs, [None] * len(packs))
        said: dict[int, str] = {}
        try:
            with stop_on_signal() as stop:
                for pack in packs[place.rank :: place.size]:
                    for number, error in work(pack, stop).items():
                        said[number] = str(error)
                if group is not None:
                    for other in group.exchange(sorted(said.items()), check=stop.check):
                        said |= dict(other)
        except Interrupted as stopped:
            log.warning(f"{stopped}; the same command goes on from here")
            sys.exit(INTERRUPTED_EXIT_CODE)
        if self.compares and place.is_first:
            write_sweep_page(sweep.path)
        return said
