"""What Hydra finds of tcsae: it takes plugins from this namespace only. See tcsae/launch/."""

from __future__ import annotations

from tcsae.launch import adaptive, here, local, slurm, sweeper


class HereLauncher(here.HereLauncher):
    """hydra/launcher=here"""


class LocalLauncher(local.LocalLauncher):
    """hydra/launcher=local"""


class SlurmLauncher(slurm.SlurmLauncher):
    """hydra/launcher=slurm"""


class GridSweeper(sweeper.GridSweeper):
    """hydra/sweeper=grid"""


class OptunaSweeper(adaptive.OptunaSweeper):
    """hydra/sweeper=optuna"""
