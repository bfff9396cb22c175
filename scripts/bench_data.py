"""Sections of scripts/bench.py about all but steps: the harvest, the evaluation, how soon training
starts, a store's growth.

`python scripts/bench_data.py FOLDER N` is what the growth section starts for each of its readings.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tcsae.base.files import load_tensors, make_folder, save_tensors
from tcsae.base.signals import StopRequest
from tcsae.data.batches import ActivationBatches, calibrate, shuffled_indices
from tcsae.data.contexts import Contexts
from tcsae.data.store import ActivationStore

ROOT = Path(__file__).parent.parent
POSITIONS = 128
HARVESTED, TOGETHER, SHARD = 128, 16, 64
OURS = f"harvest into a store, {HARVESTED * POSITIONS:,} tokens"
BARE = f"Hugging Face's forward pass alone, {HARVESTED * POSITIONS:,} tokens"
GROWTH = (1024, 4096, 16384, 32768)
WIDTH, BATCH, GROWTH_SHARD = 64, 32, 128


def some_contexts(n: int, vocabulary: int = 1000) -> Contexts:
    shape = (n, POSITIONS)
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(shape, dtype=torch.int32)
    return Contexts(ids.int(), zeros, torch.ones(shape, dtype=torch.bool), ())


# ------------------------------------------------------------------------------ harvest


def harvest_steps() -> dict[str, Callable[[], object]]:
    """A fresh store of the embedded model's layer 15, and the blocks up to it without one."""
    from transformers import AutoModel

    from tcsae.config.compose import config_of
    from tcsae.data.language_model import LanguageModel

    config = config_of("layer=15", f"model.forward_contexts={TOGETHER}", "model.dtype=auto")
    model = LanguageModel(config.model, config.layer)
    contexts = some_contexts(HARVESTED, model.vocabulary)
    plain = AutoModel.from_pretrained(str(model.weights.folder), dtype=model.dtype).eval()
    plain.layers = plain.layers[: model.layer + 1]

    def harvest() -> float:
        with tempfile.TemporaryDirectory() as folder:
            store = ActivationStore(Path(folder), model, contexts, SHARD)
            started = time.perf_counter()
            store.harvest(StopRequest())
            return time.perf_counter() - started

    @torch.inference_mode()
    def bare() -> None:
        for ids in contexts.ids.split(TOGETHER):
            plain(ids.long(), use_cache=False)

    return {OURS: harvest, BARE: bare}


# ------------------------------------------------------------------------------ evaluation

EVALUATED = 256
PASS = f"the language model up to the layer, {EVALUATED * POSITIONS:,} tokens"
CODES = f"encode and decode, {EVALUATED * POSITIONS:,} tokens"
SUITE = f"the suite of metrics with its intervals, {EVALUATED * POSITIONS:,} tokens"


def evaluation_steps() -> dict[str, Callable[[], object]]:
    """A pass of the embedded model, one of a topk SAE, and that SAE's metrics as a run has them."""
    from tcsae.config.compose import config_of
    from tcsae.data.language_model import LanguageModel
    from tcsae.measure.evaluation import ENCODE_CONTEXTS, held_out_units, on_activations
    from tcsae.sae.registry import sae_class

    config = config_of(f"dataset.n_eval_contexts={EVALUATED}")
    model = LanguageModel(config.model, config.layer)
    contexts = some_contexts(EVALUATED, model.vocabulary)
    pieces = contexts.ids.split(config.model.forward_contexts)
    x_NTD = torch.cat([model.activations(ids) for ids in pieces]).clone()
    source: Any = SimpleNamespace(
        contexts=contexts, is_read=True, activations=lambda indices: x_NTD[indices]
    )
    calibration = calibrate(source, config.dataset.norm_filter)
    batches = ActivationBatches(source, calibration, "cpu")
    sae = sae_class("topk")(config.sae, model.d_in, generator=torch.Generator().manual_seed(0))
    sae.initialise_from_data(calibration.sample)

    def language_model() -> None:
        for ids in pieces:
            model.activations(ids)

    @torch.inference_mode()
    def codes() -> None:
        for batch in batches.in_order(ENCODE_CONTEXTS):
            sae.encode_and_decode(batch.x.float(), segments=batch.segments, valid=batch.valid)

    @torch.inference_mode()
    def suite() -> None:
        _, measured, *_ = on_activations(
            sae, config, batches, held_out_units(batches), StopRequest()
        )
        measured.summary()
        measured.draws()

    return {SUITE: suite, PASS: language_model, CODES: codes}


# ------------------------------------------------------------------------------ start-up

HELP = "python -m tcsae.train --help"
FRESH = "a process of its own, store made: to the first step"
SECOND = "a sweep's second job (pack=1), store made: from the first job's end to the first step"
WANTED = {HELP: 1.5, FRESH: None, SECOND: 5.0}
RUN = ["training.log_every=1", "evaluation.analysis=false", "tracking=disabled"]
SMALL = ["dataset.n_contexts=256", "dataset.n_eval_contexts=16", "evaluation.model_contexts=8",
         "training.tokens=32768"]  # fmt: skip
WAIT_SECONDS = 600


def environment() -> dict[str, str]:
    """In which this checkout's package is found."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def train(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tcsae.train", *arguments], text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=WAIT_SECONDS)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, process.args))}\n{said}")  # type: ignore[arg-type]


def first_steps(folder: Path, process: subprocess.Popen[str], n: int) -> dict[Path, float]:
    """When each of `n` runs under `folder` had written the metrics of its first step, in order."""
    seen: dict[Path, float] = {}
    give_up = time.monotonic() + WAIT_SECONDS
    while len(seen) < n:
        for file in (*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")):
            if file.parent not in seen and file.stat().st_size:
                seen[file.parent] = time.time()
        if process.poll() not in (None, 0) or time.monotonic() > give_up:
            finish(process)
            raise RuntimeError(f"{folder}: no first step of {n} runs")
        time.sleep(0.01)
    return seen


class Startup:
    """Real commands on a small store in `root`; times are read from the files that runs write."""

    def __init__(self, root: Path, small: list[str]) -> None:
        self.root = root
        self.given = [*RUN, *small, f"store.dir={root / 'store'}"]
        finish(train(*self.given, f"hydra.run.dir={root / 'first'}"))

    def help(self) -> None:
        finish(train("--help"))

    def fresh(self) -> float:
        folder = self.root / "fresh"
        started = time.time()
        process = train(*self.given, f"hydra.run.dir={folder}")
        with self._removed(folder):
            (stepped,) = first_steps(folder, process, 1).values()
            process.terminate()
            process.communicate(timeout=WAIT_SECONDS)
        return stepped - started

    def second_job(self) -> float:
        folder = self.root / "sweep"
        given = [*self.given, "seed=1,2", "hydra.launcher.pack=1", f"hydra.sweep.dir={folder}"]
        process = train("--multirun", *given)
        with self._removed(folder):
            one, two = first_steps(folder, process, 2).items()
            ended = (one[0] / "final_info.json").stat().st_mtime
            process.terminate()
            process.communicate(timeout=WAIT_SECONDS)
        return two[1] - ended

    @contextlib.contextmanager
    def _removed(self, folder: Path) -> Iterator[None]:
        yield
        shutil.rmtree(folder)


@contextlib.contextmanager
def startup_steps(small: list[str] = SMALL) -> Iterator[dict[str, Callable[[], object]]]:
    with tempfile.TemporaryDirectory() as folder:
        runs = Startup(Path(folder), small)
        yield {HELP: runs.help, FRESH: runs.fresh, SECOND: runs.second_job}


def startup_table(rows: Mapping[str, Any]) -> str:
    lines = ["| what | s | least s | wanted, s |", "|---|---|---|---|"]
    for name, row in rows.items():
        wanted = f"{WANTED[name]:.1f}" if WANTED[name] else ""
        seconds = f"{row['ms'] / 1000:.2f} | {row['least_ms'] / 1000:.2f}"
        lines.append(f"| {name} | {seconds} | {wanted} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------ a store's growth


def growth_store(root: Path, n: int) -> ActivationStore:
    """The store of `n` contexts; contexts are mapped from a file, as in a run. No model is run."""
    tensors, _ = load_tensors(root / f"{n}.safetensors", "")
    model: Any = SimpleNamespace(identity={"weights": f"random {n}"}, d_in=WIDTH, beside=())
    return ActivationStore(root, model, Contexts(**tensors, groups=()), GROWTH_SHARD)


def write_growth_store(root: Path, n: int) -> None:
    """Random activations, written as a harvest writes them."""
    made = some_contexts(n)
    parts = {"ids": made.ids, "segments": made.segments, "valid": made.valid}
    save_tensors(root / f"{n}.safetensors", parts, {})
    store = growth_store(root, n)
    make_folder(store.folder)
    generator = torch.Generator().manual_seed(n)
    for shard in store.missing():
        shape = (GROWTH_SHARD, POSITIONS, WIDTH)
        x_NTD = torch.randn(shape, generator=generator).bfloat16()
        save_tensors(store.shard_path(shard), {"activations": x_NTD}, {"shard": str(shard)})


def memory_mb() -> dict[str, float]:
    """Of this process, from the kernel: memory of its own, and pages of files mapped into it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    said = dict(line.split(":", 1) for line in lines)
    names = {"own_mb": "RssAnon", "mapped_mb": "RssFile"}
    return {name: int(said[key].split()[0]) / 1024 for name, key in names.items()}


def read_two_epochs(root: Path, n: int) -> dict[str, float]:
    """Milliseconds a batch in the first and second epoch, and the most memory between batches."""
    store = growth_store(root, n)
    batches = ActivationBatches(store, calibrate(store, 3), "cpu")
    steps, most, found = n // BATCH, memory_mb(), {}
    for epoch, name in enumerate(("first_ms", "later_ms")):
        seconds = 0.0
        for step in range(epoch * steps, (epoch + 1) * steps):
            started = time.perf_counter()
            batches.batch(shuffled_indices(step, BATCH, n, seed=0))
            seconds += time.perf_counter() - started
            most = {key: max(most[key], mb) for key, mb in memory_mb().items()}
        found[name] = 1000 * seconds / steps
    return found | most


def store_section(rounds: int) -> dict[str, Any]:
    """Every reading in a process of its own, the sizes in turn."""
    taken: dict[int, list[dict[str, float]]] = {n: [] for n in GROWTH}
    with tempfile.TemporaryDirectory() as folder:
        for n in GROWTH:
            write_growth_store(Path(folder), n)
        for _ in range(rounds):
            for n, readings in taken.items():
                said = subprocess.run(
                    [sys.executable, __file__, folder, str(n)], check=True, text=True,
                    stdout=subprocess.PIPE, env=environment(),
                ).stdout  # fmt: skip
                readings.append(json.loads(said))
    rows = {
        f"{n:,}": {key: statistics.median(r[key] for r in readings) for key in readings[0]}
        for n, readings in taken.items()
    }
    return {"rows": rows}


def store_table(rows: Mapping[str, Any]) -> str:
    lines = [
        "| contexts | ms a batch, first epoch | ms a batch, later | memory of its own, MB "
        "| mapped pages, MB |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['first_ms']:.2f} | {row['later_ms']:.2f} | {row['own_mb']:.0f} "
            f"| {row['mapped_mb']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(read_two_epochs(Path(sys.argv[1]), int(sys.argv[2]))))
