"""The SAE on another device than the model: what is asked, what is refused, and where all lies.

The steps and the evaluation on GPUs that do not exist are in fake_cuda.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import count_calls, metric_lines, run_here, small_config, small_job, weights_digest

from tcsae.base.errors import UserError
from tcsae.config import run_id
from tcsae.config.compose import config_of
from tcsae.data import loading, stream
from tcsae.data.devices import choose_device
from tcsae.launch.jobs import passes_key, stream_key
from tcsae.launch.prepare import prepare
from tcsae.launch.together import agree


@pytest.mark.parametrize("mode", ["disk", "stream"])
def test_the_models_own_device_by_its_name_gives_the_same_run_to_the_bit(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, mode: str
) -> None:
    store = {"store": mode} if mode == "stream" else {"store.dir": str(tmp_path / "store")}
    base = {"model__device": "cpu", **{k.replace(".", "__"): v for k, v in store.items()}}
    folders = tmp_path / "null", tmp_path / "cpu"
    for folder, device in zip(folders, ("null", "cpu"), strict=True):
        done = run_here(*small_job(tiny_gpt2, texts, folder, **base, training__device=device))
        assert done.code == 0, done.stderr
    null, cpu = folders
    assert weights_digest(null) == weights_digest(cpu)
    assert metric_lines(null) == metric_lines(cpu)
    infos = [json.loads((folder / "final_info.json").read_text()) for folder in folders]
    assert infos[0]["metrics"] == infos[1]["metrics"]
    assert infos[0]["consistency"] == infos[1]["consistency"]
    assert all(info["devices"] == {"model": "cpu", "sae": "cpu"} for info in infos)
    assert infos[0]["unique_id"] != infos[1]["unique_id"]


def test_without_the_key_runs_keep_their_names() -> None:
    assert run_id(config_of()) == run_id(config_of("training.device=null"))


@pytest.mark.parametrize("key", ["model", "training"])
@pytest.mark.parametrize("device", ["meta", "cuda:x", "cuda:-1", "gpu", "cuda:1,2", "CPU", ""])
def test_what_is_no_device_is_refused_in_one_line(key: str, device: str) -> None:
    with pytest.raises(UserError) as refused:
        config_of(f"{key}.device='{device}'")
    also = "auto, " if key == "model" else ""
    assert str(refused.value) == (
        f"{key}.device = {device}: must be {also}cpu, cuda, cuda:N or mps"
    )


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "there is no GPU"),
        (1, "there is 1 GPU, cuda:0"),
        (2, "there are 2 GPUs, cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_their_number(
    monkeypatch: pytest.MonkeyPatch, n: int, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    with pytest.raises(UserError) as refused:
        choose_device(f"cuda:{n}", "training.device")
    assert str(refused.value) == (
        f"training.device = cuda:{n}: not usable here ({words}): take cpu, or null: model.device"
    )


def test_the_saes_device_is_looked_for_before_anything_is_loaded(
    tiny_gpt2: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = count_calls(loading, "load_model", monkeypatch)
    opened = count_calls(stream, "open_contexts", monkeypatch)
    arguments = small_job(
        tiny_gpt2, texts, tmp_path / "run", training__device="cuda:7", model__device="cpu"
    )
    line = run_here(*arguments, f"store.dir={tmp_path / 'store'}").refusal()
    assert "training.device = cuda:7: not usable here (there is no GPU)" in line
    assert loaded == opened == [] and not (tmp_path / "store").exists()


def test_activations_are_harvested_where_there_is_no_device_for_the_sae(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    place = {"store__dir": str(tmp_path), "model__device": "cpu", "training__device": "cuda:7"}
    prepare([small_config(tiny_gpt2, texts, **place)], "activations")
    assert len([*tmp_path.rglob("00000.safetensors")]) == 2  # of either side


def test_a_job_with_its_sae_on_a_gpu_needs_one_and_shares_no_process_with_others(
    tiny_gpt2: Path, texts: Path
) -> None:
    def config(**changes: str) -> Any:
        return small_config(tiny_gpt2, texts, **changes)

    cpu = config(model__device="cpu")
    mixed = config(model__device="cpu", training__device="cuda")
    assert not cpu.uses_gpu and mixed.uses_gpu and config().uses_gpu
    assert not config(model__device="cpu", training__device="cpu").uses_gpu
    assert config(model__device="cuda", training__device="cpu").uses_gpu
    assert stream_key(cpu) != stream_key(mixed)
    assert passes_key(cpu) == passes_key(mixed)


def test_ranks_ask_for_a_gpu_of_their_own_for_the_sae_too(
    tiny_gpt2: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[Any] = []

    class Ranks:
        def agree(self, facts: Any, problem: str | None, check: Any) -> None:
            problems.append(problem)

    monkeypatch.setattr("tcsae.launch.together.join", Ranks)
    monkeypatch.setattr("tcsae.launch.together.gpu_problem", lambda: "no GPU of its own")
    for device in ("null", "cuda"):
        given = {"model__device": "cpu", "training__device": device}
        agree([small_config(tiny_gpt2, texts, **given)], Path("x"))
    assert problems == [None, "no GPU of its own"]
