"""What a sweep will cost, before anything is submitted: device hours, disk, memory.

Operations, bytes and memory are counted on the real classes (tcsae/launch/counted.py), which loads
torch at the first job; weights and text are not loaded. Hours follow from rates that are assumed
(`Machine`). docs/scaling.md says how all this compares with what was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tcsae.base.labels import size
from tcsae.config import Config, resolve_layer
from tcsae.launch import world as worlds
from tcsae.launch.jobs import passes_key
from tcsae.launch.machine import MACHINES, Machine, Stage, Work
from tcsae.launch.model_facts import ModelFacts, model_facts, text_contexts, vectors_facts

if TYPE_CHECKING:  # it loads torch
    from tcsae.launch.counted import Evaluation, Passes, Training

HOST_BASE = {"cpu": 0.8e9, "cuda": 3e9}
"""A process with its libraries alone: 0.7 GB measured on a CPU; CUDA's share is assumed."""
SLACK = 1.2
"""Allocators hold more than is in use: up to 1.3 measured on a CPU."""
PACKING_BYTES, CONTEXT_BYTES = 23, 7
"""Host memory a token: while text becomes contexts, and of the contexts (on disk, too)."""
PACKING_SECONDS = 3e-6
"""A token of text into contexts, on two cores. Measured."""
REPORT_SECONDS, COMMON_SECONDS, PAIR_SECONDS = 8.0, 10e-9, 17e-9
"""The analysis on the host, measured: clusters and pages of one run; two features on at a token, a
lag; one pair's correlation where they are too many to be kept."""
DEAD_SHARE = 0.05
"""Dead features on average, assumed: on a CPU AuxK looks at those alone."""
USUAL_L0 = 64
"""Features a token, of architectures without a k. Assumed."""


@dataclass(frozen=True)
class Cost:
    """What one job costs. Bytes of memory are peaks."""

    harvest: Stage
    """Contexts and activations: once for all jobs that share them. With store=stream contexts
    alone."""
    stream: Stage
    """What a process does once for all its members: reads the store, or runs the model."""
    train: Stage
    evaluate: Stage
    reference: Stage
    """What a process measures of the language model itself, once for all its members."""
    harvest_tokens: int
    store_bytes: float
    run_bytes: float
    """The run folder with the last two checkpoints."""
    kept_bytes: float
    """What stays of it when the run has finished."""
    member_bytes: float
    """Device memory of this SAE in training."""
    shared_bytes: float
    """Device memory of a process beside its members: the model, and the largest workspace."""
    beside_bytes: float
    """Device memory of measuring this SAE while another is measured."""
    loaded_bytes: float
    """Host memory of contexts and calibration; beside a GPU also of the model on its way there."""
    packing_bytes: float
    """Host memory while the contexts are packed, before anything else is there."""
    has_clusters: bool
    """Whether a process of its own finds clusters."""
    device: str

    @property
    def device_bytes(self) -> float:
        """Of a process with this job alone."""
        return self.shared_bytes + self.member_bytes

    @property
    def host_bytes(self) -> float:
        """Of a process with this job alone; on a CPU, the device's memory is in it."""
        return self.host_bytes_beside(self.device_bytes)

    def host_bytes_beside(self, device_bytes: float) -> float:
        held = self.loaded_bytes + (device_bytes if self.device == "cpu" else 0)
        return HOST_BASE[self.device] + max(held, self.packing_bytes)


def hours(stage: Iterable[Work], machine: Machine) -> float:
    """Device hours of a stage at the machine's rates."""
    return sum(work.seconds(machine) for work in stage) / 3600


class _Counted(NamedTuple):
    """What the stages of a job are made of."""

    config: Config
    facts: ModelFacts
    contexts: tuple[int, int]
    """(training, held-out)"""
    tokens: int
    number: int
    """Bytes of one in the language model and in the store."""
    to_hook: Passes
    whole: Passes
    training: Training
    measured: Evaluation


def _counted(config: Config, machine: Machine) -> _Counted | None:
    world = config.model.world
    facts = model_facts(config.model) if world is None else worlds.facts_of(world)
    if config.model.is_given:
        facts = vectors_facts(config.dataset)
    contexts = text_contexts(config.dataset)
    if facts is None or contexts is None:
        return None
    from tcsae.launch import counted

    size, at_once = config.dataset.context_size, config.model.forward_contexts
    short, sae_short = (
        wanted == "bfloat16" or (wanted == "auto" and machine.bfloat16)
        for wanted in (config.model.dtype, config.training.precision)
    )
    if config.model.is_given:
        read = Work("read the vectors", disk_bytes=4.0 * size * facts.d_model)
        to_hook = whole = counted.Passes(read, 0, 0)
    elif world is None:
        to_hook = counted.passes(facts.shape, at_once, size, _layer(config, facts) + 1, short)
        whole = counted.passes(facts.shape, at_once, size, None, short)
    else:
        to_hook = whole = counted.Passes(worlds.draw(world, size), 0, 0)
    return _Counted(
        config,
        facts,
        contexts,
        sum(contexts) * size,
        2 if short else 4,
        to_hook,
        whole,
        counted.training_of(config, facts.d_model, sae_short, machine.device == "cpu"),
        counted.evaluation_of(config, facts.d_model, facts.d_vocab, short),
    )


def job_cost(config: Config, machine: Machine = MACHINES["a100"]) -> Cost | None:
    """The cost of one job; None if the model's shape or the amount of text is not known.

    Of `machine`, only its kind matters here: what `auto` comes to, and whether it is a CPU.
    """
    c = _counted(config, machine)
    if c is None:
        return None
    harvest, stream, store_bytes = _stream(c, machine)
    from tcsae.data.batches import CALIBRATION_CONTEXTS  # with torch, which counting has loaded
    from tcsae.jobs.side_by_side import BYTES_A_FEATURE

    workspaces = (c.training.workspace, c.measured.workspace, c.to_hook.workspace)
    size, d_in = config.dataset.context_size, c.facts.d_model
    sample = 3 * 4.0 * min(CALIBRATION_CONTEXTS, c.contexts[0]) * size * d_in
    on_its_way = 0 if machine.device == "cpu" else c.whole.weights
    return Cost(
        harvest=harvest,
        stream=stream,
        train=_train(c, machine),
        evaluate=_evaluate(c),
        reference=_on_model(c, c.whole.forward.plus(_from_hook(c)), c.measured.reference),
        harvest_tokens=0 if config.store.mode == "stream" else c.tokens,
        store_bytes=CONTEXT_BYTES * c.tokens + store_bytes,
        run_bytes=_run_bytes(c) + _checkpoint_bytes(c),
        kept_bytes=_run_bytes(c) + _checkpoint_bytes(c) * c.config.training.keep_checkpoints,
        member_bytes=c.training.held,
        shared_bytes=c.whole.weights + SLACK * max(workspaces),
        beside_bytes=float(BYTES_A_FEATURE * config.sae.d_sae),
        loaded_bytes=CONTEXT_BYTES * c.tokens + sample + on_its_way,
        packing_bytes=float(PACKING_BYTES * c.tokens),
        has_clusters=config.evaluation.analysis,
        device=machine.device,
    )


def _stream(c: _Counted, machine: Machine) -> tuple[Stage, Stage, float]:
    """(harvest, stream, bytes of activations on disk)."""
    config, size = c.config, c.config.dataset.context_size
    pack = Work("pack the text", host_seconds=PACKING_SECONDS * c.tokens)
    trained = config.steps * config.training.batch_contexts
    if config.store.mode == "stream":
        # Held-out contexts are run once, for all that is measured on them.
        return (pack,), (c.to_hook.forward.times(trained + c.contexts[1]),), 0.0
    context_bytes = size * c.facts.d_model * c.number
    stored = float(sum(c.contexts) * context_bytes)
    harvest = (
        pack,
        c.to_hook.forward.times(sum(c.contexts)),
        Work("write the store", disk_bytes=stored, hash_bytes=stored),
    )
    # A shard is read whole when it is first opened, to verify its checksum.
    again = 0 if stored <= machine.page_cache_gb * 1e9 else trained * context_bytes
    return harvest, (Work("read the store", disk_bytes=stored + again, hash_bytes=stored),), stored


def _train(c: _Counted, machine: Machine) -> Stage:
    """All the steps of one SAE."""
    cfg, steps = c.config.training, c.config.steps
    tokens = cfg.batch_contexts * c.config.dataset.context_size
    early = min(steps, math.ceil(c.config.sae.dead_after_tokens / tokens))
    # On a GPU, where the host does not know which, all features are looked at.
    dead = DEAD_SHARE * steps if machine.device == "cpu" else steps - early
    saved = (steps / cfg.checkpoint_every) * c.training.checkpoint
    return (
        c.training.step.times(steps),
        c.training.dead.times(dead),
        c.training.logged.times(steps / cfg.log_every),
        Work("checkpoints", disk_bytes=saved, hash_bytes=saved),
    )


def _on_model(c: _Counted, forward: Work, scores: Work) -> Stage:
    """What goes through the model of the contexts that are run to its logits, and the scores."""
    if c.config.model.why_no_text is not None:
        return ()  # it has no logits
    contexts = min(c.config.evaluation.model_contexts, c.contexts[1])
    return forward.times(contexts), scores.times(contexts)


def _from_hook(c: _Counted) -> Work:
    """A pass from the hook to the logits: what comes before is run once for all stand-ins."""
    return c.whole.forward.plus(c.to_hook.forward, -1)


def _evaluate(c: _Counted) -> Stage:
    stage = (
        c.measured.features.times(c.contexts[1]),
        c.measured.draws,
        *_on_model(c, _from_hook(c), c.measured.scores),
    )
    if c.config.model.world is not None:
        stage = (*stage, worlds.truth(c.config, c.contexts[1]))
    return (*stage, _analysis(c)) if c.config.evaluation.analysis else stage


def _analysis(c: _Counted) -> Work:
    """Rough: correlations of sparse codes on the host; of all pairs, lag by lag, in a wide SAE."""
    from tcsae.measure.analysis_pass import DENSE_ENTRIES, SPARSE_ENTRIES

    lags, pairs = c.config.evaluation.redundancy_max_lag, float(c.config.sae.d_sae) ** 2
    tokens, on = c.contexts[1] * c.config.dataset.context_size, _features_on(c.config)
    seconds = REPORT_SECONDS + COMMON_SECONDS * tokens * (lags + 1) * on**2
    if (lags + 1) * pairs > DENSE_ENTRIES:
        seconds += PAIR_SECONDS * max(pairs, min((2 * lags + 1) * pairs, SPARSE_ENTRIES))
    return Work("analysis", host_seconds=seconds)


def _features_on(config: Config) -> int:
    return getattr(config.sae, "k", None) or USUAL_L0


def _checkpoint_bytes(c: _Counted) -> float:
    """The last two."""
    return 2 * c.training.checkpoint


def _run_bytes(c: _Counted) -> float:
    """`sae/`, `eval/`, and roughly `analysis/`, the report and W&B's files."""
    from tcsae.measure.analysis_pass import CLOSE_FEATURES

    cfg, size, d_sae = c.config.evaluation, c.config.dataset.context_size, c.config.sae.d_sae
    per_feature = 4 * (cfg.max_lag + 1 + 2 * size) + 2_000
    close = min(d_sae, CLOSE_FEATURES) if cfg.analysis else 0
    pages = 1e6 + 6e6 * cfg.analysis + close * (16 * size + 1_500)
    # A third of a checkpoint are weights.
    return c.training.checkpoint / 3 + d_sae * per_feature + pages


def _layer(config: Config, facts: ModelFacts) -> int:
    try:
        return resolve_layer(config.layer, facts.n_layers)
    except ValueError:
        return facts.n_layers - 1  # the job refuses such a layer; its cost has no meaning


def harvest_key(config: Config) -> str:
    """Equal for jobs that read the same store: what addresses it, as far as a config says."""
    return _digest([passes_key(config), _place_of(config)])


def _place_of(config: Config) -> list[Any]:
    facts = model_facts(config.model)
    return [config.layer if facts is None else _layer(config, facts), config.model.hook]


def _digest(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def members_that_fit(config: Config, device_gb: float, machine: Machine = MACHINES["a100"]) -> int:
    """How many SAEs of this config train side by side in that memory; at least 1.

    `device_gb` (1e9 bytes) is a GPU's memory, or what a process on a CPU may use of the host's.
    """
    cost = job_cost(config, machine)
    if cost is None:
        return 1
    free = device_gb * 1e9 - cost.shared_bytes
    if machine.device == "cpu":
        free -= HOST_BASE["cpu"] + cost.loaded_bytes
    return max(1, int(free // cost.member_bytes))


# --------------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True)
class SweepCost:
    """What a sweep costs; hours are None where the machine has no rates."""

    machine: Machine
    n_jobs: int
    n_unknown: int
    """Jobs that were not estimated, and are in no figure."""
    n_harvests: int
    """Stores that have to be made."""
    harvest_tokens: int
    harvest_hours: float | None
    """With packing the text."""
    train_hours: float | None
    """With reading the store, or running the model beside."""
    evaluate_hours: float | None
    pack_hours: tuple[float, ...]
    """By process, with the whole harvest that it needs."""
    store_bytes: float
    """New on disk."""
    run_bytes: float
    """While all of them are at work."""
    kept_bytes: float
    device_bytes: float
    """Of the largest process."""
    host_bytes: float
    """Of the largest process."""
    beside_bytes: tuple[float, float]
    """What the largest process takes more, as far as memory and cores allow, to measure several
    jobs at the same time: of its device, and of the host for the processes that find clusters."""

    @property
    def device_hours(self) -> float | None:
        if not self.machine.has_rates:
            return None
        parts = (self.harvest_hours, self.train_hours, self.evaluate_hours)
        return sum(part or 0.0 for part in parts)

    def lines(self) -> list[str]:
        """For people, before anything is submitted."""
        n_known = self.n_jobs - self.n_unknown
        out = []
        if self.n_unknown:
            out.append(
                f"{self.n_unknown} of {self.n_jobs} jobs are not estimated (a model or text whose "
                "size is not known beforehand)"
            )
        if not n_known:
            return out
        harvest = "nothing to harvest"
        if self.n_harvests:
            times = "1 harvest" if self.n_harvests == 1 else f"{self.n_harvests} harvests"
            harvest = f"{times} of {self.harvest_tokens / 1e6:,.1f} M tokens in all"
        out.append(f"{harvest}, if no store has them yet" if self.n_harvests else harvest)
        out += self._hours_lines()
        out.append(
            f"disk: activations {size(self.store_bytes)}, runs {size(self.run_bytes)} "
            f"({size(self.run_bytes / n_known)} each; finished {size(self.kept_bytes / n_known)})"
        )
        memory = f"host {size(self.host_bytes)}"
        if self.machine.device != "cpu":
            memory = f"device {size(self.device_bytes)}, {memory}"
        if any(self.beside_bytes):
            on_device, apart = self.beside_bytes
            more = size(on_device + apart)
            if self.machine.device != "cpu":
                more = f"device {size(on_device)}, host {size(apart)}"
            memory += f"; up to {more} more while several jobs are measured, where there is room"
        out.append(f"memory of the largest process: {memory}")
        return out

    def _rates(self) -> str:
        """In words, and whether they were measured."""
        machine, kind = self.machine, "bfloat16" if self.machine.bfloat16 else "float32"
        if machine.is_measured:
            each = f"{machine.tflops:.2g} TFLOP/s in {kind} and {machine.bandwidth_gb_s:.2g} GB/s"
            return f"{each} of memory a process, tried here just now,"
        rates = f"{machine.tflops:g} TFLOP/s and {machine.bandwidth_gb_s:g} GB/s of memory"
        return f"an assumed {rates}, not measured,"

    def _hours_lines(self) -> list[str]:
        if self.device_hours is None:
            return ["hours: not estimated (set hydra.launcher.tflops and bandwidth_gb_s)"]
        kind = "process" if self.machine.device == "cpu" else "GPU"
        return [
            f"about {span(self.device_hours)} of {kind} time: harvest {span(self.harvest_hours)}, "
            f"training {span(self.train_hours)}, evaluation {span(self.evaluate_hours)}; "
            f"the longest process {span(max(self.pack_hours))}",
            f"  computed from operations and bytes at {self._rates()} and an assumed "
            f"{self.machine.disk_gb_s:g} GB/s of disk; without queueing and start-up",
        ]


@dataclass(frozen=True)
class Ranks:
    """Processes that do a pack: they harvest together, and then each has jobs of its own or, where
    they train `together`, a part of every batch."""

    size: int = 1
    together: bool = False

    def parts(self, pack: Sequence[int]) -> list[Sequence[int]]:
        """The jobs of each process that is not idle."""
        parts = [pack] if self.together else [pack[rank :: self.size] for rank in range(self.size)]
        return [part for part in parts if part]


@dataclass(frozen=True)
class _Process:
    """The jobs of a pack, and the store that they wait for if it is not there."""

    members: list[Cost]
    harvest: Stage
    ranks: Ranks

    @property
    def shared(self) -> Stage:
        """The longest stream: shorter members end on the way."""
        return max((cost.stream for cost in self.members), key=_most)

    @property
    def reference(self) -> Stage:
        return max((cost.reference for cost in self.members), key=_most)

    @property
    def device_bytes(self) -> float:
        shared = max(cost.shared_bytes for cost in self.members)
        return shared + sum(cost.member_bytes for cost in self.members)

    @property
    def host_bytes(self) -> float:
        return max(cost.host_bytes_beside(self.device_bytes) for cost in self.members)

    def beside_bytes(self, cores: int | None) -> tuple[float, float]:
        """(of the device, of processes apart on the host) where as many jobs as can be are measured
        at the same time."""
        from tcsae.jobs.side_by_side import HELPER_BYTES, MOST_AT_ONCE

        n = min(len(self.members), MOST_AT_ONCE, cores or MOST_AT_ONCE)
        if n < 2:
            return 0.0, 0.0
        helpers = n * HELPER_BYTES * any(cost.has_clusters for cost in self.members)
        return (n - 1) * max(cost.beside_bytes for cost in self.members), float(helpers)

    def hours(self, machine: Machine) -> float:
        def each(*stages: Stage) -> float:
            return sum(hours(stage, machine) for stage in stages)

        trained = each(self.shared, *(cost.train for cost in self.members))
        alone = each(self.reference, *(cost.evaluate for cost in self.members))
        shared = self.ranks.size if self.ranks.together else 1
        return each(self.harvest) / self.ranks.size + trained / shared + alone


def _most(stage: Stage) -> float:
    return sum(work.flops + work.float32_flops + work.disk_bytes for work in stage)


ALONE = Ranks()


def sweep_cost(
    configs: Sequence[Config],
    packs: Sequence[Sequence[int]],
    machine: Machine,
    harvested: Callable[[Config], bool] | None = None,
    ranks: Ranks = ALONE,
) -> SweepCost:
    """What the jobs cost together.

    Args:
        packs: indices into `configs`, one list for each process, or for all `ranks` of one. The
            jobs of a pack read one stream.
        machine: what each process runs on.
        harvested: whether a job's store is there already; None: none is.
    """
    costs = [job_cost(config, machine) for config in configs]
    new: dict[str, Cost] = {}
    passes: dict[str, set[str]] = {}
    for config, cost in zip(configs, costs, strict=True):
        if cost is not None and not (harvested and harvested(config)):
            key = harvest_key(config)
            new.setdefault(key, cost)
            if config.store.mode == "disk":
                passes.setdefault(passes_key(config), set()).add(key)
    processes = []
    for pack in (part for whole in packs for part in ranks.parts(whole)):
        members = [(harvest_key(configs[i]), cost) for i in pack if (cost := costs[i])]
        if members:
            harvest = new[members[0][0]].harvest if members[0][0] in new else ()
            processes.append(_Process([cost for _, cost in members], harvest, ranks))
    for together in passes.values():
        # The deepest layer's pass fills the stores of all, each process waits for it, and what the
        # others add is what they write.
        for key in sorted(together, key=lambda key: _most(new[key].harvest))[:-1]:
            cost = new[key]
            new[key] = replace(cost, harvest=cost.harvest[-1:], harvest_tokens=0)
    jobs = [cost for process in processes for cost in process.members]

    def total(*stages: Stage) -> float | None:
        return sum(hours(stage, machine) for stage in stages) if machine.has_rates else None

    return SweepCost(
        machine=machine,
        n_jobs=len(configs),
        n_unknown=sum(cost is None for cost in costs),
        n_harvests=sum(cost.harvest_tokens > 0 for cost in new.values()),
        harvest_tokens=sum(cost.harvest_tokens for cost in new.values()),
        harvest_hours=total(*(cost.harvest for cost in new.values())),
        train_hours=total(*(p.shared for p in processes), *(cost.train for cost in jobs)),
        evaluate_hours=total(*(p.reference for p in processes), *(cost.evaluate for cost in jobs)),
        pack_hours=tuple(p.hours(machine) for p in processes) if machine.has_rates else (),
        store_bytes=sum(cost.store_bytes for cost in new.values()),
        run_bytes=sum(cost.run_bytes for cost in jobs),
        kept_bytes=sum(cost.kept_bytes for cost in jobs),
        device_bytes=max((process.device_bytes for process in processes), default=0.0),
        host_bytes=max((process.host_bytes for process in processes), default=0.0),
        beside_bytes=max((p.beside_bytes(machine.cores) for p in processes), default=(0.0, 0.0)),
    )


def span(n_hours: float | None) -> str:
    """4.3 min or 12 h: the two digits that an estimate may claim; "0" for none."""
    if not n_hours:
        return "0"
    if n_hours < 1 / 60:
        return "<1 min"
    value, unit = (n_hours, "h") if n_hours >= 1 else (60 * n_hours, "min")
    return f"{value:.2g} {unit}" if value < 9.95 else f"{value:,.0f} {unit}"
