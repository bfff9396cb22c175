"""The default launcher: the packs one after the other, in this process."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from tcsae.errors import INTERRUPTED_EXIT_CODE, Interrupted
from tcsae.launch.launcher import GridLauncher, Packs

if TYPE_CHECKING:
    from tcsae.launch.options import Options
    from tcsae.launch.sweep_folder import SweepFolder

log = logging.getLogger(__name__)


class HereLauncher(GridLauncher):
    kind = "here"

    @property
    def options(self) -> Options:
        from tcsae.launch.options import Options, checked

        return checked(Options, self.given)

    def processes(self) -> int | None:
        return 1

    def execute(self, sweep: SweepFolder, packs: Packs) -> dict[int, str]:
        from tcsae.launch.closing import write_sweep_page
        from tcsae.launch.worker import work
        from tcsae.signals import stop_on_signal

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
        if self.options.compare:
            write_sweep_page(sweep.path)
        return said
