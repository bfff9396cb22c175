"""How a grid is packed, and what is said of it before it begins."""

from __future__ import annotations

from collections.abc import Sequence, Set

from tcsae.launch.jobs import GridJob, make_packs, stream_key
from tcsae.launch.options import Options
from tcsae.launch.sweep_folder import SweepFolder

LARGEST_AUTO_PACK = 16
SHOWN = 40


def packed(
    jobs: Sequence[GridJob], options: Options, processes: int | None
) -> list[list[GridJob]]:
    """The packs, each the work of one process."""

    def size(together: list[GridJob]) -> int:
        if options.pack != "auto":
            return options.pack
        spread = -(-len(together) // processes) if processes else len(together)
        return min(LARGEST_AUTO_PACK, spread)

    return make_packs(jobs, size)


def plan_lines(
    jobs: Sequence[GridJob],
    packs: Sequence[Sequence[GridJob]],
    before: Set[int],
    options: Options,
    sweep: SweepFolder,
) -> list[str]:
    """The jobs, the packing, and the estimated cost."""
    n_streams = len({stream_key(job.config) for job in jobs})
    lines = [f"{len(jobs)} jobs in {sweep.path}"]
    if before:
        lines.append(f"{len(before)} are finished already and are left alone (rerun=true: not)")
    n_left = sum(len(pack) for pack in packs)
    streams = "1 stream" if n_streams == 1 else f"{n_streams} streams"
    lines.append(
        f"{n_left} to do in {_processes(packs)}, on {streams} of activations"
    )
    if options.dry_run:
        where = {job.number: index for index, pack in enumerate(packs) for job in pack}
        for job in jobs:
            place = f"process {where[job.number]}" if job.number in where else "finished"
            lines.append(f"  {job.number:>4}  {place:<12} {job.name}")
    return lines


def _processes(packs: Sequence[Sequence[GridJob]]) -> str:
    sizes = sorted({len(pack) for pack in packs})
    if len(packs) == 1:
        return f"one process, {sizes[0]} side by side"
    side_by_side = " or ".join(str(size) for size in sizes) or "none"
    return f"{len(packs)} processes, {side_by_side} side by side"
