"""A training step on a GPU that does not exist (fake_cuda.py), without one and without a driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux", reason="the guard takes torch's place by LD_PRELOAD")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU: tests/gpu")
@pytest.mark.skipif(shutil.which("g++") is None, reason="NO COMPILER: g++ makes the device guard")
def test_a_step_without_a_gpu_as_if_there_were_one(tmp_path: Path) -> None:
    made = tmp_path / "fake_cuda.so"
    paths = [f"-I{path}" for path in include_paths()]
    for path in library_paths():
        paths += [f"-L{path}", f"-Wl,-rpath,{path}"]
    line = ["g++", "-std=c++20", "-shared", "-fPIC", "-o", made, HERE / "fake_cuda.cpp"]
    built = subprocess.run([*line, *paths, "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    own = [str(path) for path in (HERE.parents[1], HERE.parent, HERE)]
    more = {"LD_PRELOAD": str(made), "PYTHONPATH": os.pathsep.join(own)}
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(HERE)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "fake_cuda.py"],
        capture_output=True, text=True, env=os.environ | more, cwd=HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^52 passed", done.stdout.splitlines()[-1]), done.stdout[-500:]
