"""Triton's kernels without a GPU: in its interpreter, and compiled ahead of time."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tcsae.base.errors import UserError
from tcsae.products import BY_DEVICE, choose, kernels
from tcsae.products.cpu import CPU
from tcsae.products.plain import Plain

HERE = Path(__file__).parent


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Triton reads its flag when it is imported, for good."""
    paths = [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = kept | {"PYTHONPATH": os.pathsep.join(paths)} | more
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=HERE
    )


def test_they_compute_what_float64_does() -> None:
    options = ("-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(HERE))
    done = run("-m", "pytest", *options, "in_interpreter.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^26 passed", done.stdout.splitlines()[-1]), done.stdout[-500:]


def test_compiled_they_spill_nothing_and_add_in_one_order() -> None:
    done = run("ahead_of_time.py")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) == 34
    assert [row for row in found if row[2] or row[3]] == []


def test_the_benchmark_for_a_card_runs_on_a_cpu(tmp_path: Path) -> None:
    script, file = HERE.parents[1] / "scripts" / "bench_gpu.py", tmp_path / "bench.json"
    done = run(str(script), "--smoke", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    ((title, sizes),) = found["sizes"].items()
    assert title == "d_sae 512, k 8, 256 tokens" and found["same_bits_twice"]["auto"]
    ours = [row for name, row in sizes["rows"].items() if name.startswith("ours")]
    assert len(ours) == 4 and all(row["ms"] > 0 for row in ours)
    assert sizes["rows"]["SAELens, autocast"]["ms"] > 0
    if not torch.cuda.is_available():
        assert "--smoke tries the script" in run(str(script)).stderr


def test_the_harvest_benchmark_for_a_card_runs_on_a_cpu(tmp_path: Path) -> None:
    script, file = HERE.parents[1] / "scripts" / "bench_gpu_harvest.py", tmp_path / "harvest.json"
    done = run(str(script), "--smoke", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    models = json.loads(file.read_text())["models"]
    assert set(models) == {"gpt2", "smollm2", "gemma-2-2b"}
    for rows in models.values():
        assert all(rate > 0 for row in rows.values() for rate in row.values())


def test_nothing_is_tuned_or_added_out_of_order() -> None:
    """A choice by a timing, or a sum in an order that changes, would end exact resumption."""
    tree = ast.parse(Path(kernels.__file__).read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {name for name in names if "atomic" in name or name in ("autotune", "dot")}


def test_what_a_process_trains_by_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BY_DEVICE, "cpu", BY_DEVICE["cpu"])
    assert choose("plain", "cpu") == "plain" and type(BY_DEVICE["cpu"]) is Plain
    assert choose("auto", "cpu") == "cpu" and type(BY_DEVICE["cpu"]) is CPU
    with pytest.raises(UserError, match=r"training\.products = triton: its kernels run on a GPU"):
        choose("triton", "cpu")


def test_where_triton_does_not_run_training_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not torch.cuda.is_available(), "this test is for a machine without a GPU"
    monkeypatch.setitem(BY_DEVICE, "cuda", BY_DEVICE["cuda"])
    assert choose("auto", "cuda") == "plain"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Triton's kernels do not run here") and "\n" not in line
    with pytest.raises(UserError, match=r"training\.products=plain does without"):
        choose("triton", "cuda")
