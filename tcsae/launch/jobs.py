"""The jobs of a grid, and the packs in which one process does several of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tcsae.base.files import read_json, write_json
from tcsae.base.run_files import RunFiles
from tcsae.config import Config, parse, shared_by_a_bank


@dataclass(frozen=True)
class GridJob:
    """One point of a grid."""

    number: int
    name: str
    """What varies: "window=8,lambda=0.1"."""
    overrides: tuple[str, ...]
    config: Config
    folder: Path
    """Absolute."""
    hydra_files: dict[str, str]
    """The content of its `.hydra` folder."""

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.folder)

    @property
    def is_finished(self) -> bool:
        return self.files.is_finished


def names_of(overrides: Sequence[Sequence[str]], shown: Sequence[str] = ()) -> list[str]:
    """For every job the overrides in which the jobs differ, and those of the keys `shown`, the seed
    last; "job" if in none."""
    values = [dict(o.lstrip("+").split("=", 1) for o in job if "=" in o) for job in overrides]
    keys = sorted(dict.fromkeys(key for job in values for key in job), key="seed".__eq__)
    varying = [key for key in keys if key in shown or len({job.get(key) for job in values}) > 1]
    return [
        ",".join(f"{key}={job[key]}" for key in varying if key in job) or "job" for job in values
    ]


def stream_key(config: Config) -> str:
    """Equal for jobs that can be trained side by side: the same activations, in the same order."""
    shared = shared_by_a_bank(config) | {"store": config.store.model_dump(mode="json")}
    return json.dumps(shared, sort_keys=True)


def make_packs(
    jobs: Sequence[GridJob], size: Callable[[list[GridJob]], int]
) -> list[list[GridJob]]:
    """Jobs of one stream together, in packs of nearly equal length.

    `size` says for the jobs of one stream how many may be in one process.
    """
    streams: dict[str, list[GridJob]] = {}
    for job in jobs:
        streams.setdefault(stream_key(job.config), []).append(job)
    packs = []
    for together in streams.values():
        n = -(-len(together) // max(size(together), 1))
        bounds = [len(together) * i // n for i in range(n + 1)]
        packs += [together[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return packs


def reading_once(packs: Sequence[Sequence[GridJob]]) -> list[list[GridJob]]:
    """The packs, those of one model and text told of each other's layers and hooks, so that
    whichever harvests a shard makes it for all of them, by one forward pass."""
    places: dict[str, dict[str, None]] = {}
    for pack in packs:
        for job in pack:
            places.setdefault(passes_key(job.config), {})[_place(job.config)] = None

    def told(job: GridJob) -> GridJob:
        config = job.config
        if config.store.mode == "stream" or config.model.why_no_text is not None:
            return job
        others = [*config.store.also, *places[passes_key(config)]]
        also = [place for place in dict.fromkeys(map(str, others)) if place != _place(config)]
        store = config.store.model_copy(update={"also": also})
        return replace(job, config=config.model_copy(update={"store": store}))

    return [[told(job) for job in pack] for pack in packs]


def passes_key(config: Config) -> str:
    """Equal for jobs whose stores one forward pass of the model fills, whatever their layers."""
    dataset = config.dataset.model_dump(mode="json", exclude={"name", "norm_filter"})
    model = config.model.model_dump(
        mode="json",
        exclude={"n_layers", "default_layer", "forward_contexts", "extra_masked_ids", "hook"},
    )
    if model["path"] is not None or model["package"] is not None:
        del model["name"]
    if model["dtype"] != "auto":
        del model["device"], model["device_map"]
    store = config.store.model_dump(mode="json", exclude={"also"})
    return json.dumps([model, dataset, store], sort_keys=True)


def _place(config: Config) -> str:
    layer = "middle" if config.layer is None else config.layer
    return f"{layer}.{config.model.hook}"


def write_pack(path: Path, pack: Sequence[GridJob], sweep: Path) -> None:
    """A pack as JSON, for the process that will do it."""
    jobs = [
        {
            "number": job.number,
            "name": job.name,
            "overrides": job.overrides,
            "config": job.config.dump(),
            "folder": str(job.folder),
            "hydra_files": job.hydra_files,
        }
        for job in pack
    ]
    write_json(path, {"sweep": str(sweep), "jobs": jobs})


def read_pack(path: Path) -> list[GridJob]:
    return [_job(described) for described in read_json(path)["jobs"]]


def _job(described: dict[str, Any]) -> GridJob:
    return GridJob(
        described["number"],
        described["name"],
        tuple(described["overrides"]),
        parse(described["config"]),
        Path(described["folder"]),
        described["hydra_files"],
    )
