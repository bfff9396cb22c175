"""A language model over several devices. Without GPUs: the hooks that accelerate puts around its
modules, all of them on the CPU, and maps of one device."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_here, small_job, weights_digest
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.config import ModelConfig
from tcsae.config.compose import config_of
from tcsae.data import language_model
from tcsae.data.language_model import LanguageModel
from tcsae.data.loading import load_model

ON_THE_CPU = '{"": "cpu"}'


def tiny(folder: Path, also: list[int | str] | None = None, **changes: Any) -> LanguageModel:
    given = {"name": "test/tiny", "path": str(folder), "dtype": "float32", **changes}
    return LanguageModel(ModelConfig.model_validate(given), 1, also or [])


def ids(model: LanguageModel) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(3, model.vocabulary, (2, 16), generator=draws)


def halved(x_BTD: Tensor) -> Tensor:
    return x_BTD / 2


def everything(model: LanguageModel) -> list[Tensor]:
    """All that is read of a model."""
    ids_BT = ids(model)
    found = [model.activations(ids_BT), model.logits(ids_BT), model.logits(ids_BT, halved)]
    found += [x for x in model.activations_at(ids_BT, [model, *model.beside]) if x is not None]
    with model.repeated(ids_BT) as logits:
        found += [logits(), logits(halved), logits()]
    found.append(model.logits(ids_BT))  # what was skipped before runs again
    growing = model.growing()
    found += [growing.logits(ids_BT[:1, :8]), growing.logits(ids_BT[:1, 8:])]
    unembedding = model.unembedding()
    assert unembedding is not None and len(found) == 11
    return [*found, unembedding]


def same(a: LanguageModel, b: LanguageModel) -> bool:
    return all(map(torch.equal, everything(a), everything(b)))


@pytest.fixture(params=["gpt2", "gemma2", "llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(f"tiny_{request.param}")
    return found


@pytest.mark.parametrize("placed", [ON_THE_CPU, "auto", "balanced"])
def test_a_map_of_the_one_device_that_there_is_changes_no_bit(
    folder: Path, placed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = tiny(folder, also=[0], device_map=placed)
    assert same(model, tiny(folder, also=[0], device="cpu"))
    assert model.checks is not None and model.checks["device_map"] == {"": "cpu"}


def test_what_moves_tensors_between_devices_changes_no_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import dispatch_model

    def dispatched(*of: Any) -> Any:
        model = load_model(*of[:3])
        blocks = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
        base = blocks.rpartition(".")[0]
        parts = [name for name, _ in model.get_submodule(base).named_children()]
        placed = {f"{base}.{name}": "cpu" for name in parts if f"{base}.{name}" != blocks}
        placed |= {f"{blocks}.{n}": "cpu" for n in range(3)} | {"lm_head": "cpu"}
        return dispatch_model(model, placed, force_hooks=True)

    plain = tiny(folder, also=[0], device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "load_model", dispatched)
        model = tiny(folder, also=[0], device_map=ON_THE_CPU)
        assert same(model, plain)
    network = model._network
    assert network._before  # blocks are skipped, by a forward in the place of the hook's
    assert all(hasattr(block, "_hf_hook") for block in network._before)
    assert all("forward" in vars(block) for block in network._before)
    assert model.checks is not None and plain.checks is not None
    assert len(model.checks["device_map"]) > 4
    assert model.checks["transformer_lens"] == plain.checks["transformer_lens"]


def test_a_run_on_a_mapped_model_ends_with_the_same_weights(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    placed = {"model__device_map": "{transformer:cpu,lm_head:cpu}"}
    for name, how in (("plain", {"model__device": "cpu"}), ("mapped", placed)):
        of = small_job(tiny_gpt2, texts, tmp_path / name, **how)
        done = run_here(*of, f"store.dir={tmp_path / f'store-{name}'}")
        assert done.code == 0, done.stderr
    assert weights_digest(tmp_path / "plain") == weights_digest(tmp_path / "mapped")
    plain, mapped = (
        json.loads((tmp_path / name / "final_info.json").read_text())
        for name in ("plain", "mapped")
    )
    assert plain["metrics"] == mapped["metrics"]
    assert mapped["model_checks"].pop("device_map") and plain["unique_id"] != mapped["unique_id"]
    assert plain["model_checks"] == mapped["model_checks"]


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        ("sequential", "must be auto, balanced, {module: device} or null"),
        ("[0,1]", "must be auto, balanced, {module: device} or null"),
        ("{}", "must be auto, balanced, {module: device} or null"),
        ("{a:disk}", "a on disk: must be cpu, cuda:N (or N) or mps"),
        ("{a:meta}", "a on meta: must be cpu, cuda:N (or N) or mps"),
        ("{a:0,b:cpu}", "all on GPUs, or all on the CPU"),
        ("'{\"a\": '", "is no JSON"),
    ],
)
def test_a_map_that_says_nothing_sensible_is_refused_in_one_line(placed: str, words: str) -> None:
    with pytest.raises(UserError, match="^model.device_map") as refused:
        config_of(f"model.device_map={placed}")
    assert words in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_numbers_are_gpus_and_names_may_come_as_json() -> None:
    wanted = {"model.layers.0": "cuda:0", "model.layers.1": "cuda:1"}
    for text in ("{model.layers.0:0,model.layers.1:cuda:1}", f"'{json.dumps(wanted)}'"):
        assert config_of(f"model.device_map={text}").model.device_map == wanted


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        ({"transformer": "cpu", "nosuch": "cpu"}, "nosuch is no module of it (there are wte, wpe"),
        ({"transformer.h": "cpu"}, "model.device_map says nothing of transformer.wte.weight"),
        ({"": "cuda:7"}, "model.device_map = cuda:7: not usable here"),
    ],
)
def test_a_map_that_is_not_of_the_model_or_the_machine_is_refused_in_one_line(
    tiny_gpt2: Path, placed: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError) as refused:
        model = tiny(tiny_gpt2, device_map=placed)
        model.activations(ids(model))
    assert words in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_weights_that_no_device_has_room_for_are_refused(tiny_gpt2: Path) -> None:
    with pytest.raises(ValueError, match="the devices have no room for transformer.*more GPUs"):
        load_model(tiny_gpt2, torch.float32, False, {"": "disk"})


def test_without_accelerate_one_line_says_what_to_install(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "accelerate" else found(n, *a)
    )
    with pytest.raises(UserError, match="^model.device_map needs accelerate: pip install acc"):
        tiny(tiny_gpt2, device_map="auto")
    assert tiny(tiny_gpt2).device
