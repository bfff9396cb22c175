"""The default launcher: the packs one after the other, in this process."""

from __future__ import annotations

import logging
import sys

from tcsae.base.errors import INTERRUPTED_EXIT_CODE, Interrupted
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
        return 1

    def execute(self, sweep: SweepFolder, packs: Packs) -> dict[int, str]:
        sweep.add_submission(packs, [None] * len(packs))
        said = {}
        try:
            with stop_on_signal() as stop:
                for pack in packs:
                    for number, error in work(pack, stop).items():
                        said[number] = str(error)
        except Interrupted as stopped:
            log.warning(f"{stopped}; the same command goes on from here")
            sys.exit(INTERRUPTED_EXIT_CODE)
        if self.compares:
            write_sweep_page(sweep.path)
        return said
