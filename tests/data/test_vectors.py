"""dataset=activations: own vectors as documents, and a run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_here, weights_digest
from safetensors.torch import save_file

from tcsae.base.errors import UserError
from tcsae.config import DatasetConfig, ModelConfig
from tcsae.config.compose import config_of
from tcsae.data.synthetic_model import SyntheticModel
from tcsae.data.vectors import Vectors, open_vectors
from tcsae.data.vectors_model import VectorsModel

D = 6
GIVEN = ModelConfig(name="activations", hook="given", device="cpu", n_layers=1)


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def config_for(path: Path, **changes: Any) -> DatasetConfig:
    fields = {"n_contexts": None, "n_eval_contexts": 2, "context_size": 8, **changes}
    return DatasetConfig(name="own", source="activations", path=str(path), **fields)


def test_every_form_gives_the_same_vectors(tmp_path: Path) -> None:
    x = numbers(5, 7, D)
    (folder := tmp_path / "npy").mkdir()
    np.save(folder / "a.npy", x[:2].astype(np.float16))
    np.save(folder / "b.npy", x[2:].reshape(-1, D))
    np.save(folder / "b.documents.npy", np.repeat([4, 9, 2], 7))
    save_file(
        {"x": torch.from_numpy(x.reshape(-1, D)), "positions": torch.arange(7).repeat(5)},
        tmp_path / "x.safetensors",
    )
    for path in (folder, tmp_path / "x.safetensors"):
        found = Vectors(path)
        assert (found.n, found.d_in) == (35, D)
        assert [len(d.ids) for d in found.documents() if d.ids is not None] == [7] * 5
        order = np.array([[34, 0], [13, 14]])
        expected = x.reshape(-1, D)[order]
        np.testing.assert_allclose(found.take(order), expected, atol=2e-3)
    groups = [d.group for d in Vectors(folder).documents()]
    assert groups == ["a.npy:0", "a.npy:1", "b.npy:4", "b.npy:9", "b.npy:2"]


def test_contexts_hold_the_vectors_of_whole_documents(tmp_path: Path) -> None:
    x = numbers(40, 7, D)
    np.save(tmp_path / "x.npy", x)
    model = VectorsModel(GIVEN, config_for(tmp_path), 0)
    train, held_out = model.contexts(config_for(tmp_path))
    assert len(held_out) == 2 and len(train) > 25
    seen = []
    for side in (train, held_out):
        found = model.activations(side.ids)
        assert torch.equal(found[:, 0], torch.zeros(len(side), D)) and not side.valid[:, 0].any()
        assert side.valid[:, 1:].all() and int(side.segments.max()) == 1
        rows = (side.ids[:, 1] - 1).numpy() // 7
        assert torch.equal(found[:, 1:], torch.from_numpy(x[rows]))
        seen.append(set(rows.tolist()))
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no activations"),
        ({"a.npy": numbers(4)}, "has shape [4]"),
        ({"a.npy": numbers(4, 0)}, "has shape [4, 0]"),
        ({"a.npy": numbers(4, D), "b.npy": numbers(4, D + 1)}, "several widths (a.npy 6, b.npy 7)"),
        ({"a.npy": np.arange(12).reshape(2, 6)}, "holds int64, no float numbers"),
        ({"a.npy": np.asfortranarray(numbers(4, D))}, "np.ascontiguousarray"),
        ({"a.npy": np.array([{}, None])}, "cannot be read as an array"),
        ({"a.npy": numbers(4, D), "a.documents.npy": np.arange(3)}, "documents must be 4 whole"),
        ({"a.npy": numbers(4, D), "a.positions.npy": numbers(4)}, "positions must be 4 whole"),
        ({"a.npy": np.full((4, D), np.nan, np.float32)}, "vector 0 is not finite"),
        ({"a.npy": numbers(4, D), "b.npy": numbers(4, D, seed=1)}, "too small"),
        ({"a.npy": numbers(400, D)}, "is one document"),
    ],
)
def test_what_does_not_fit_is_one_line(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    for name, array in files.items():
        np.save(tmp_path / name, array, allow_pickle=array.dtype == object)
    cfg = config_for(tmp_path)
    with pytest.raises(UserError) as raised:
        VectorsModel(GIVEN, cfg, 0).contexts(cfg)
    message = str(raised.value)
    assert said in message and "\n" not in message


def test_a_broken_safetensors_file_is_one_line(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, D), "b": torch.ones(2, D)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="holds a, b: name the vectors activations"):
        Vectors(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        Vectors(tmp_path)


def test_changed_files_are_other_vectors(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbers(9, D))
    first = open_vectors(str(tmp_path))
    before = first.digest
    assert open_vectors(str(tmp_path)) is first
    np.save(tmp_path / "x.npy", numbers(9, D, seed=1)[:8])
    assert open_vectors(str(tmp_path)).digest != before


def test_the_dataset_chooses_its_model() -> None:
    config = config_of("dataset=activations", "dataset.path=x")
    assert (config.model.hook, config.store.mode) == ("given", "stream")
    for wrong in (["dataset=activations", "model=gpt2"], ["model.hook=given"]):
        with pytest.raises(UserError, match="dataset=activations"):
            config_of(*wrong, "dataset.path=x")
    with pytest.raises(UserError, match="has no language model"):
        config_of("dataset=activations", "dataset.path=x", "evaluation.model_contexts=3")


# ------------------------------------------------------------------------------ a whole run

WORLD = {
    "world": "absorption",
    "model.world.d_in": "12",
    "model.world.document_tokens": "31",
    "model.world.classes.parent.n": "8",
    "model.world.classes.parent.density": "0.1",
    "model.world.children.per_parent": "1",
    "model.world.noise": "0.05",
}
SHARED = {
    "dataset.context_size": "32",
    "dataset.n_contexts": "256",
    "dataset.n_eval_contexts": "32",
    "evaluation.max_lag": "8",
    "evaluation.windows": "[2,4]",
    "evaluation.bootstrap": "100",
    "evaluation.analysis": "false",
    "training.batch_contexts": "8",
    "training.tokens": "30000",
    "training.precision": "float32",
    "training.target_l0": "2",
    "sae.d_sae": "32",
    "lambda": "1",
    "window": "4",
    "tracking": "disabled",
}


def settings(*parts: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for part in parts for key, value in part.items()]


def test_a_worlds_activations_train_what_the_world_trains(own_store: Path, tmp_path: Path) -> None:
    """Written in the order in which they are drawn, they give the same run to the last bit."""
    config = config_of("model=synthetic", *settings(WORLD, SHARED))
    world = SyntheticModel(config.model, 0)
    (vectors := tmp_path / "vectors").mkdir()
    # Which document is drawn when hangs on its name alone.
    np.save(vectors / "x.npy", numbers(400, 31, 12))
    own = config_of("dataset=activations", f"dataset.path={vectors}", *settings(SHARED))
    drawn = VectorsModel(own.model, own.dataset, 0).contexts(own.dataset)
    x = np.zeros((400, 31, 12), dtype=np.float32)
    for side, sides_own in zip(world.contexts(config.dataset), drawn, strict=True):
        assert len(side) == len(sides_own)
        documents = (sides_own.ids[:, 1] - 1).numpy() // 31
        x[documents] = world.activations(side.ids)[:, 1:].numpy()
    np.save(vectors / "x.npy", x)

    outcome = run_here(
        "model=synthetic", *settings(WORLD, SHARED), f"hydra.run.dir={tmp_path / 'world'}"
    )
    assert outcome.code == 0, outcome.stderr
    outcome = run_here(
        "dataset=activations",
        f"dataset.path={vectors}",
        *settings(SHARED),
        f"hydra.run.dir={tmp_path / 'own'}",
    )
    assert outcome.code == 0, outcome.stderr
    assert weights_digest(tmp_path / "own") == weights_digest(tmp_path / "world")

    infos = [json.loads((tmp_path / n / "final_info.json").read_text()) for n in ("world", "own")]
    world_metrics, own_metrics = (info["metrics"] for info in infos)
    assert own_metrics["reconstruction_quality"] == world_metrics["reconstruction_quality"]
    assert "truth" in infos[0] and "truth" not in infos[1]
    notes = " ".join((tmp_path / "own" / "notes.txt").read_text().split())
    assert "activations of one's own come without a language model" in notes


def test_a_run_on_own_activations_has_a_page(own_store: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbers(400, 31, 12))
    changes = {"evaluation.analysis": "true", "store": "disk", "training.tokens": "4096"}
    outcome = run_here(
        "dataset=activations",
        f"dataset.path={tmp_path / 'x.npy'}",
        *settings(SHARED | changes),
        f"hydra.run.dir={tmp_path / 'run'}",
    )
    assert outcome.code == 0, outcome.stderr
    page = (tmp_path / "run" / "report.html").read_text()
    assert "own activations" in page
    import tcsae
    from tcsae.base.signals import StopRequest
    from tcsae.jobs.foreign import from_folder
    from tcsae.jobs.measure_foreign import evaluate_sae

    run = tcsae.load_run(tmp_path / "run")
    with pytest.raises(UserError, match="these are activations of one's own: no text can be read"):
        run.features("a text")
    with pytest.raises(UserError, match="what was measured of a run is in its folder"):
        evaluate_sae(from_folder(tmp_path / "run" / "sae"), [], tmp_path / "again", StopRequest())
