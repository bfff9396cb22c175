"""The store: one harvest for many jobs, whole shards or none, and the same tensors each time."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import count_calls, harvest_together, leftovers, run_here, small_config, small_job
from hypothesis import given, settings
from hypothesis import strategies as st

from tcsae.base.errors import Interrupted, UserError
from tcsae.base.files import Lock, atomic, load_tensors, locked, save_tensors, write_text
from tcsae.base.signals import StopRequest
from tcsae.data.batches import Calibration, calibrate, shuffled_indices
from tcsae.data.language_model import LanguageModel
from tcsae.data.network import Network
from tcsae.data.store import StreamSource
from tcsae.data.stream import Stream, open_stream

SHARDS = 7  # 48 training and 8 held-out contexts, 8 in a shard
PASSES = 14  # 4 in a forward pass


@pytest.fixture(scope="module")
def _harvested(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    opened(tiny_gpt2, texts, root)
    return root


@pytest.fixture
def store(_harvested: Path, tmp_path: Path) -> Path:
    """A whole store that the test may spoil."""
    return Path(shutil.copytree(_harvested, tmp_path / "store"))


def opened(
    weights: Path, texts: Path, root: Path, stop: StopRequest | None = None, **changes: str
) -> Stream:
    config = small_config(weights, texts, store__dir=str(root), **{"layer": "1", **changes})
    return open_stream(config, StopRequest() if stop is None else stop)


def everything(stream: Stream) -> dict[str, torch.Tensor]:
    batches = {
        "train": stream.train.batch(torch.arange(len(stream.train))),
        "eval": stream.evaluation.batch(torch.arange(len(stream.evaluation))),
    }
    names = ("x", "ids", "segments", "valid")
    return {f"{side}.{name}": getattr(b, name) for side, b in batches.items() for name in names}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def shards(store: Path) -> list[Path]:
    """Those of the training contexts first: they are more."""
    folders = sorted(store.glob("activations/*"), key=lambda f: -len(list(f.glob("*.safetensors"))))
    return [shard for folder in folders for shard in sorted(folder.glob("*.safetensors"))]


# ------------------------------------------------------------------------- harvested once


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": "8", "lambda": "1"},
        {"seed": "3", "sae__d_sae": "64"},
        {"sae": "standard", "training__lr": "1e-4", "consistency": "shuffled"},
        {"model__forward_contexts": "16", "dataset__norm_filter": "5"},
    ],
)
def test_jobs_that_need_the_same_activations_harvest_them_once(
    changes: dict[str, str],
    tiny_gpt2: Path,
    texts: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = count_calls(LanguageModel, "activations_at", monkeypatch)
    opened(tiny_gpt2, texts, store, **changes)
    assert len(shards(store)) == SHARDS
    assert passes == []


@pytest.mark.parametrize(
    "changes",
    [
        {"layer": "0"},
        {"model__hook": "mlp_out"},
        {"model__dtype": "bfloat16"},
        {"dataset__context_size": "20"},
        {"dataset__seed": "1"},
        {"store__shard_contexts": "16"},
    ],
)
def test_other_activations_go_to_another_place(
    changes: dict[str, str],
    tiny_gpt2: Path,
    texts: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = shards(store)
    passes = count_calls(LanguageModel, "activations_at", monkeypatch)
    opened(tiny_gpt2, texts, store, **changes)
    assert len(passes) > 0
    assert set(before) < set(shards(store))


ALSO = ["0", "1.mlp_out", "0.attn_out"]


def test_several_layers_and_hooks_are_harvested_in_one_forward_pass(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as one by one, and the text is read once."""
    forwards = count_calls(Network, "activations", monkeypatch)
    together, alone = tmp_path / "together", tmp_path / "alone"
    opened(tiny_gpt2, texts, together, store__also=f"[{','.join(ALSO)}]")
    once = len(forwards)
    for layer, hook in (("0", "resid_post"), ("1", "mlp_out"), ("0", "attn_out")):
        forwards.clear()
        found = opened(tiny_gpt2, texts, together, layer=layer, model__hook=hook)
        assert forwards == []
        wanted = opened(tiny_gpt2, texts, alone, layer=layer, model__hook=hook)
        assert len(forwards) == once == PASSES
        assert_same(everything(found), everything(wanted))


def test_what_the_store_has_of_a_place_is_left_alone(
    tiny_gpt2: Path, texts: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {shard: shard.stat().st_mtime_ns for shard in shards(store)}
    opened(tiny_gpt2, texts, store, layer="0", store__also="[1]")
    assert len(shards(store)) == 2 * SHARDS
    assert {shard: shard.stat().st_mtime_ns for shard in before} == before
    passes = count_calls(LanguageModel, "activations_at", monkeypatch)
    opened(tiny_gpt2, texts, store, store__also="[0, middle]")
    assert passes == []


def test_a_place_that_is_not_there_is_left_out(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(tiny_gpt2, texts, tmp_path, store__also="[99]")
    assert len(shards(tmp_path)) == SHARDS
    assert "store.also: layer = 99: must be 0 to" in caplog.text
    with pytest.raises(
        UserError, match=r"store\.also.*0\.resid_mid: a place is LAYER or LAYER\.HOOK"
    ):
        opened(tiny_gpt2, texts, tmp_path, store__also="[0.resid_mid]")


def test_other_weights_in_the_same_folder_are_other_activations(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(tiny_gpt2, tmp_path / "model"))
    first = everything(opened(copy, texts, tmp_path / "store"))
    tensors = load_file(copy / "model.safetensors")
    tensors = {name: tensor * 1.5 for name, tensor in tensors.items()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    second = everything(opened(copy, texts, tmp_path / "store"))
    assert not torch.equal(first["train.x"], second["train.x"])
    assert torch.equal(first["train.ids"], second["train.ids"])


def test_what_is_read_is_what_the_model_says(tiny_gpt2: Path, texts: Path, store: Path) -> None:
    stream = opened(tiny_gpt2, texts, store)
    indices = torch.tensor([47, 0, 8, 7])
    batch = stream.train.batch(indices)
    expected = stream.model.activations(batch.ids)
    torch.testing.assert_close(batch.x, expected, rtol=1e-5, atol=1e-5)


def test_a_bounded_number_of_shards_is_open_and_what_is_read_stays_the_same(
    tiny_gpt2: Path, texts: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = opened(tiny_gpt2, texts, store).train
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    expected = whole.source.activations(order)
    monkeypatch.setattr("tcsae.data.store.MAX_OPEN_SHARDS", 2)
    source: Any = opened(tiny_gpt2, texts, store).train.source
    assert torch.equal(source.activations(order), expected)
    assert len(source._open) == 2 < source.n_shards


# ---------------------------------------------------------------------- damage is noticed


def test_any_flipped_bit_in_a_file_of_tensors_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.arange(5.0), "b": torch.tensor([1, 2])}
    save_tensors(path, tensors, {"facts": '{"step": 3}'})
    good = path.read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 1 << position * 5 % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match="is damaged .*; delete it"):
            load_tensors(path, "delete it")


def test_any_truncation_of_a_file_of_tensors_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(5.0)}, {})
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match="is damaged .*; delete it"):
            load_tensors(path, "delete it")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("which", "spoil"),
    [
        ("shard", truncate),
        ("shard", flip_a_bit),
        ("shard", empty),
        ("held-out shard", flip_a_bit),
        ("contexts", truncate),
    ],
)
def test_a_damaged_file_is_one_line_and_deleting_it_mends_it(
    which: str, spoil: Any, tiny_gpt2: Path, texts: Path, store: Path, tmp_path: Path
) -> None:
    contexts = next(store.glob("contexts/*/eval.safetensors"))
    damaged = {"shard": shards(store)[3], "held-out shard": shards(store)[-1], "contexts": contexts}
    spoil(damaged[which])
    arguments = small_job(
        tiny_gpt2, texts, tmp_path / "run", store__dir=str(store), layer="1", **{"lambda": "0"}
    )
    line = run_here(*arguments).refusal()
    assert str(damaged[which]) in line and "is damaged" in line
    assert "delete it; the next run" in line
    damaged[which].unlink()
    assert run_here(*arguments).code == 0


def test_what_a_killed_writer_left_is_ignored_and_cleaned(
    tiny_gpt2: Path, texts: Path, store: Path
) -> None:
    whole = everything(opened(tiny_gpt2, texts, store))
    shard = shards(store)[2]
    data = shard.read_bytes()
    shard.unlink()
    left = shard.parent / f".{shard.name}.abcd1234.tmp"
    left.mkdir()
    (left / ".tmpQx7").write_bytes(data[:1000])
    assert leftovers(store) != []
    assert_same(everything(opened(tiny_gpt2, texts, store)), whole)
    assert leftovers(store) == []
    assert shard.read_bytes() == data


# ------------------------------------------------------------------------- stopped and resumed


def test_a_harvest_that_died_goes_on_at_the_first_missing_shard(
    tiny_gpt2: Path, texts: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = {shard.name: shard.read_bytes() for shard in shards(store)[:6]}
    passes = count_calls(LanguageModel, "activations_at", monkeypatch)
    inner = LanguageModel.activations_at

    def dies(self: LanguageModel, ids: torch.Tensor, places: Any) -> list[torch.Tensor | None]:
        if len(passes) == 7:
            raise MemoryError
        return inner(self, ids, places)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "activations_at", dies)
        with pytest.raises(MemoryError):
            opened(tiny_gpt2, texts, tmp_path / "other")
    assert len(shards(tmp_path / "other")) == 3
    passes.clear()
    opened(tiny_gpt2, texts, tmp_path / "other")
    assert len(passes) == PASSES - 6
    resumed = {shard.name: shard.read_bytes() for shard in shards(tmp_path / "other")[:6]}
    assert resumed == undisturbed


def test_a_signal_stops_a_harvest_and_whole_shards_stay(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    passes = count_calls(LanguageModel, "activations_at", monkeypatch)
    inner = LanguageModel.activations_at

    def signalled(self: LanguageModel, ids: torch.Tensor, places: Any) -> list[torch.Tensor | None]:
        if len(passes) == 4:
            stop.signal_name = "SIGTERM"
        return inner(self, ids, places)

    monkeypatch.setattr(LanguageModel, "activations_at", signalled)
    with pytest.raises(Interrupted, match="SIGTERM"):
        opened(tiny_gpt2, texts, tmp_path, stop)
    assert len(shards(tmp_path)) == 2
    assert leftovers(tmp_path) == []


def test_a_disk_that_refuses_a_shard_ends_the_harvest_and_frees_its_lock(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are written while the next ones are computed: what the disk said is not lost."""

    def full(path: Path, *given: Any) -> None:
        if path.name == "00002.safetensors":
            raise UserError("no space left")
        save_tensors(path, *given)

    with monkeypatch.context() as patch:
        patch.setattr("tcsae.data.store.save_tensors", full)
        with pytest.raises(UserError, match="no space left"):
            opened(tiny_gpt2, texts, tmp_path)
    assert [shard.name for shard in shards(tmp_path)] == ["00000.safetensors", "00001.safetensors"]
    opened(tiny_gpt2, texts, tmp_path)
    assert "00002.safetensors" in {shard.name for shard in shards(tmp_path)}


def test_a_signal_stops_the_packing_of_contexts(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    stop = StopRequest()
    stop.signal_name = "SIGINT"
    with pytest.raises(Interrupted):
        opened(tiny_gpt2, texts, tmp_path, stop)
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("what", ["shard", "contexts"])
def test_a_signal_ends_the_wait_for_another_process(
    what: str, tiny_gpt2: Path, texts: Path, store: Path
) -> None:
    if what == "shard":
        awaited = shards(store)[0]
        lock = awaited.parent / "locks" / f"{awaited.stem}.lock"
        others = [shard for shard in shards(store)[1:] if shard.parent == awaited.parent]
        for shard in others:
            shard.unlink()
    else:
        awaited = next(store.glob("contexts/*/train.safetensors"))
        lock, others = awaited.parent / ".lock", []
    awaited.unlink()
    stop = StopRequest()

    def signal_when_only_the_wait_is_left() -> None:
        # What nobody holds is not waited for: without it this never ends by itself.
        deadline = time.monotonic() + 60
        while not all(shard.exists() for shard in others) and time.monotonic() < deadline:
            time.sleep(0.01)
        stop.handle(15, None)

    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sender = threading.Thread(target=signal_when_only_the_wait_is_left)
        sender.start()
        with pytest.raises(Interrupted):
            opened(tiny_gpt2, texts, store, stop)
        sender.join()
    assert not awaited.exists()
    assert all(shard.exists() for shard in others)


# ------------------------------------------------------------------------------- two writers


def two_at_once(weights: Path, texts: Path, root: Path, times: int, layer: str = "1") -> None:
    """This process and another open the same stream in an empty store at the same moment; or, with
    another `layer`, this one that of layer 1, and the other that one's, each told of the other."""
    roots = [str(root / str(i)) for i in range(times)]
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    arguments = (str(weights), str(texts), roots, barrier, answers)
    also = f"[1,{layer}]"
    other = context.Process(target=harvest_together, args=(*arguments, layer, also))
    other.start()
    harvest_together(*arguments, "1", also)
    said = [answers.get(timeout=60) for _ in range(2 * times)]
    other.join(timeout=60)
    assert other.exitcode == 0
    for place in {"1", layer}:
        opened(weights, texts, root / "alone", layer=place)
    alone = [shard.read_bytes() for shard in shards(root / "alone")]
    assert len({digest for *_, digest in said}) == len({"1", layer})
    for store in roots:
        packings, passes, _ = zip(*(rest for where, *rest in said if where == store), strict=True)
        assert len(passes) == 2
        assert (sum(packings), sum(passes)) == (1, PASSES)
        assert [shard.read_bytes() for shard in shards(Path(store))] == alone
        assert leftovers(Path(store)) == []


def test_two_processes_make_one_good_store(tiny_gpt2: Path, texts: Path, tmp_path: Path) -> None:
    two_at_once(tiny_gpt2, texts, tmp_path, times=5)


def test_processes_at_two_layers_read_the_text_once(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    two_at_once(tiny_gpt2, texts, tmp_path, times=5, layer="0")


@pytest.mark.slow
def test_two_processes_make_one_good_store_twenty_times_over(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    two_at_once(tiny_gpt2, texts, tmp_path, times=20)


def test_a_file_system_without_locks_serves_too(
    tiny_gpt2: Path,
    texts: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    root = tmp_path / "unlocked"
    opened(tiny_gpt2, texts, root)
    assert "no file locks here; work may be done twice" in caplog.text
    assert [s.read_bytes() for s in shards(root)] == [s.read_bytes() for s in shards(store)]
    # Without a lock nobody knows whether a temporary file is somebody's who is at work.
    shard = shards(root)[0]
    shard.unlink()
    other = shard.parent / f".{shard.name}.abcd1234.tmp"
    other.mkdir()
    opened(tiny_gpt2, texts, root)
    assert shard.exists() and other.exists()


# ------------------------------------------------------------------------------- streaming


def test_streaming_gives_the_activations_of_the_disk(
    tiny_gemma2: Path, texts: Path, tmp_path: Path
) -> None:
    disk = everything(opened(tiny_gemma2, texts, tmp_path / "disk"))
    streamed = everything(opened(tiny_gemma2, texts, tmp_path / "stream", store="stream"))
    assert shards(tmp_path / "stream") == []
    for name in ("ids", "segments", "valid"):
        assert torch.equal(disk[f"train.{name}"], streamed[f"train.{name}"])
    torch.testing.assert_close(disk["train.x"], streamed["train.x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(disk["eval.x"], streamed["eval.x"], rtol=1e-5, atol=1e-5)


def test_a_whole_run_works_without_activations_on_disk(
    tiny_gpt2: Path, texts: Path, own_store: Path, tmp_path: Path
) -> None:
    outcome = run_here(*small_job(tiny_gpt2, texts, tmp_path / "run", store="stream", layer="1"))
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "run" / "final_info.json").is_file()
    assert not (own_store / "activations").exists()


# ------------------------------------------------------------------------ order, masks, scale


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40), batch=st.integers(1, 25), epochs=st.integers(1, 4), seed=st.integers(0, 9)
)
def test_every_context_comes_once_an_epoch(n: int, batch: int, epochs: int, seed: int) -> None:
    steps = -(-n * epochs // batch)
    order = torch.cat([shuffled_indices(step, batch, n, seed) for step in range(steps)])
    for epoch in range(epochs):
        assert order[epoch * n : (epoch + 1) * n].sort().values.tolist() == list(range(n))


@given(step=st.integers(0, 10**6), seed=st.integers(0, 1000))
def test_the_order_is_a_function_of_step_and_seed_alone(step: int, seed: int) -> None:
    first = shuffled_indices(step, 8, 50, seed)
    torch.manual_seed(step)
    shuffled_indices(step + 100, 8, 50, seed)  # what was asked before must not matter
    assert torch.equal(shuffled_indices(step, 8, 50, seed), first)


def test_another_seed_and_another_epoch_are_another_order() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return shuffled_indices(number, 50, 50, seed).tolist()

    orders = [tuple(epoch(number, seed)) for number in range(5) for seed in range(5)]
    assert len(set(orders)) == 25


def test_scale_and_massive_tokens_are_those_of_the_valid_positions(
    tiny_gpt2: Path, texts: Path, store: Path
) -> None:
    stream = opened(tiny_gpt2, texts, store)
    whole = stream.train.source.activations(torch.arange(48))
    valid = stream.train.source.contexts.valid
    norms = whole[valid].norm(dim=-1).sort().values
    calibration = calibrate(stream.train.source, norm_filter=1.2)
    assert calibration.median_norm == norms[(len(norms) - 1) // 2].item()
    limit = 1.2 * calibration.median_norm
    share = (norms > limit).double().mean().item()
    assert calibration.massive_share == pytest.approx(share, abs=1e-6)
    assert 0 < calibration.massive_share < 0.5
    assert calibration.sample.shape == (int((norms <= limit).sum()), 48)
    stream.train.calibration = calibration
    batch = stream.train.batch(torch.arange(48))
    assert torch.equal(batch.valid, valid & (whole.norm(dim=-1) <= limit))


def test_without_a_filter_no_token_is_massive(tiny_gpt2: Path, texts: Path, store: Path) -> None:
    stream = opened(tiny_gpt2, texts, store, dataset__norm_filter="0")
    assert stream.train.calibration.massive_share == 0
    batch = stream.train.batch(torch.arange(48))
    assert torch.equal(batch.valid, stream.train.source.contexts.valid)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_activations_without_a_scale_are_refused(
    value: float, tiny_gpt2: Path, texts: Path, store: Path
) -> None:
    stream = opened(tiny_gpt2, texts, store)

    class Broken(StreamSource):
        def activations(self, indices: torch.Tensor) -> torch.Tensor:
            return torch.full((len(indices), 16, 48), value)

    with pytest.raises(UserError, match="median norm of the activations is .*: check the weights"):
        calibrate(Broken(stream.model, stream.train.source.contexts), 10)


def test_a_single_massive_token_moves_neither_scale_nor_the_others(
    tiny_gpt2: Path, texts: Path, store: Path
) -> None:
    stream = opened(tiny_gpt2, texts, store)
    clean = stream.train.calibration

    class Massive(StreamSource):
        def activations(self, indices: torch.Tensor) -> torch.Tensor:
            x = stream.train.source.activations(indices).clone()
            x[0, 5] *= 1000
            return x

    found = calibrate(Massive(stream.model, stream.train.source.contexts), 10)
    assert isinstance(found, Calibration)
    assert found.median_norm == pytest.approx(clean.median_norm, rel=1e-2)
    assert len(found.sample) == len(clean.sample) - 1


# ---------------------------------------------------------------------------- files and locks


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_get_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)}, {})
        write_text(tmp_path / "b.txt", "b")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "b.txt"):
        mode = stat.S_IMODE((tmp_path / name).stat().st_mode)
        assert mode == 0o666 & ~umask, (name, oct(mode))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_who_reads_the_old_file_goes_on_reading_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_text(path, "old " * 10_000)
    with open(path) as reader:
        assert reader.read(4) == "old "
        write_text(path, "new")
        assert reader.read() == "old " * 9_999
    assert path.read_text() == "new"


def test_a_lock_is_held_by_one_at_a_time_and_ends_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with locked(path) as first:
        assert first is Lock.HELD
        with open(path) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with locked(path) as second:
            assert second is Lock.BUSY
    with locked(path) as third:
        assert third is Lock.HELD


def test_who_waits_for_a_lock_gets_it_when_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.touch()
    held = open(path)  # noqa: SIM115  (closed, and so released, while the wait goes on)
    fcntl.flock(held, fcntl.LOCK_EX)
    with locked(path, waiting=held.close) as lock:
        assert lock is Lock.HELD
