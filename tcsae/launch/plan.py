"""How a grid is packed, and what is said of it before it begins."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence, Set
from dataclasses import replace

from tcsae.config import Config, identity, run_id
from tcsae.config.launcher import LocalOptions, Options, SlurmOptions
from tcsae.launch.estimate import Ranks, members_that_fit, sweep_cost
from tcsae.launch.jobs import GridJob, make_packs, reading_once, stream_key
from tcsae.launch.machine import Machine
from tcsae.launch.pack_ranks import n_tasks, trains_together
from tcsae.launch.sweep_folder import SweepFolder

LARGEST_AUTO_PACK = 16
_OF_THE_LOSS = ("consistency", "window", "lambda")


def packed(
    jobs: Sequence[GridJob], options: Options, processes: int | None, device: str
) -> list[list[GridJob]]:
    """The packs, each the work of one process on a device ("cuda" or "cpu")."""

    def size(together: list[GridJob]) -> int:
        if options.pack != "auto":
            return options.pack
        tasks = n_tasks(options)
        spread = -(-len(together) // processes) if processes else len(together)
        memory = options.device_memory_gb or _half_of_memory_gb() / (processes or 1)
        machine = _machine(options, device)
        fit = min(members_that_fit(job.config, memory, machine) for job in together)
        return min(LARGEST_AUTO_PACK * tasks, spread, fit * tasks)

    return reading_once(make_packs(jobs, size))


def _machine(options: Options, device: str) -> Machine:
    """With the rates that are asked for or, where the work is this machine's CPU's, as tried."""
    if options.tflops is None and device == "cpu" and not isinstance(options, SlurmOptions):
        # With torch, which a plan without cost is free of.
        from tcsae.jobs.side_by_side import cores
        from tcsae.launch.rates import measured_cpu

        n = options.processes if isinstance(options, LocalOptions) else 1
        whole, rates = measured_cpu(), ("tflops", "bandwidth_gb_s", "float32")
        each = {name: getattr(whole, name) / n for name in rates}
        return replace(whole, **each, cores=cores())
    given = options.cpus_per_task if isinstance(options, SlurmOptions) else None
    return Machine(options.tflops, options.bandwidth_gb_s, device, cores=given)


def _half_of_memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2e9


def plan_lines(
    jobs: Sequence[GridJob],
    packs: Sequence[Sequence[GridJob]],
    before: Set[int],
    sent: Set[int],
    options: Options,
    sweep: SweepFolder,
    device: str,
) -> list[str]:
    """The jobs, the packing, and the estimated cost."""
    n_streams = len({stream_key(job.config) for job in jobs})
    lines = [f"{len(jobs)} jobs in {sweep.path}"]
    if before:
        lines.append(f"{len(before)} are finished already and are left alone (rerun=true: not)")
    if sent:
        lines.append(f"{len(sent)} have been sent before and have not ended: they are waited for")
    n_left = sum(len(pack) for pack in packs)
    if again := len({job.number for job in jobs} - before - sent) - n_left:
        lines.append(f"{again} are the same as another and are done once with it")
    if alike := _alike_without_a_loss(jobs):
        lines.append(
            f"{alike} without temporal loss differ from another only in what it would do (window, "
            "form): the same SAE again; hydra.sweeper.points takes lambda=0 once (docs/slurm.md)"
        )
    streams = "1 stream" if n_streams == 1 else f"{n_streams} streams"
    tasks, together = n_tasks(options), trains_together(options, len(jobs))
    done_by = _processes(packs) if tasks == 1 else _slurm_jobs(packs, tasks, together)
    lines.append(f"{n_left} to do in {done_by}, on {streams} of activations")
    if options.dry_run:
        where = {job.number: index for index, pack in enumerate(packs) for job in pack}
        same = {job.folder: job.number for pack in packs for job in pack}
        for job in jobs:
            place = "sent before" if job.number in sent else "finished"
            if job.number in where:
                place = f"process {where[job.number]}"
            elif job.folder in same:
                place = f"as job {same[job.folder]}"
            lines.append(f"  {job.number:>4}  {place:<12} {job.name}")
    to_do = [job for pack in packs for job in pack]
    if to_do:
        index = {job.number: i for i, job in enumerate(to_do)}
        numbers = [[index[job.number] for job in pack] for pack in packs]
        lines += cost_lines([job.config for job in to_do], numbers, options, device, together)
    return lines


def _alike_without_a_loss(jobs: Sequence[GridJob]) -> int:
    """How many runs train an SAE that an earlier one of them trains as well."""
    kinds = {}
    for config in (job.config for job in jobs):
        content = identity(config)
        if (config.lambda_ == 0 or config.consistency.form == "none") and not config.averaged:
            content = {k: v for k, v in content.items() if k not in _OF_THE_LOSS}
            content["training"] = content["training"] | {"lambda_warmup": None}
            kinds[run_id(config)] = json.dumps(content, sort_keys=True)
    return len(kinds) - len(set(kinds.values()))


def cost_lines(
    configs: Sequence[Config],
    packs: Sequence[Sequence[int]],
    options: Options,
    device: str,
    together: bool = False,
) -> list[str]:
    """The estimated cost of jobs; `packs` has their numbers, pack by pack. `together`: all tasks of
    a pack train its one job."""
    ranks = Ranks(n_tasks(options), together)
    return sweep_cost(configs, packs, _machine(options, device), ranks=ranks).lines()


def _slurm_jobs(packs: Sequence[Sequence[GridJob]], tasks: int, together: bool) -> str:
    sizes = " or ".join(map(str, sorted({len(pack) for pack in packs}))) or "none"
    many = "one Slurm job" if len(packs) == 1 else f"{len(packs)} Slurm jobs"
    done = "train one together" if together else f"share out {sizes}"
    return f"{many} of {tasks} tasks, which {done}"


def _processes(packs: Sequence[Sequence[GridJob]]) -> str:
    sizes = sorted({len(pack) for pack in packs})
    if len(packs) == 1:
        return f"one process, {sizes[0]} side by side"
    side_by_side = " or ".join(str(size) for size in sizes) or "none"
    return f"{len(packs)} processes, {side_by_side} side by side"
