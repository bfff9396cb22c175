"""A small run with everything a page can show."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import EVIL


@pytest.fixture(scope="session")
def run_folder(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real job of 12 steps with its analysis."""
    from helpers import small_config

    from tcsae.base.files import load_tensors
    from tcsae.base.signals import stop_on_signal
    from tcsae.data.stream import open_stream
    from tcsae.jobs.bank import run
    from tcsae.measure.analysis import analyse
    from tcsae.runs.folder import load_run

    root = tmp_path_factory.mktemp("report")
    config = small_config(
        tiny_gpt2, texts, store__dir=str(root / "store"), dataset__n_eval_contexts="24"
    )
    folder = root / "run"
    run(config, folder)
    per_feature, _ = load_tensors(folder / "eval" / "per_feature.safetensors", "")
    with stop_on_signal() as stop:
        stream = open_stream(config, stop)
        sae = load_run(folder).sae
        analysis = analyse(sae, config, stream.model, stream.evaluation, per_feature, stop)
    analysis.write(folder / "analysis")
    return folder


@pytest.fixture(scope="session")
def evil_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with every token and every cluster named EVIL."""
    import json
    import shutil

    folder = tmp_path_factory.mktemp("evil") / "run"
    shutil.copytree(run_folder, folder)
    tokens = folder / "analysis" / "top_contexts.json"
    content = json.loads(tokens.read_text())
    content["tokens"] = dict.fromkeys(content["tokens"], EVIL)
    tokens.write_text(json.dumps(content))
    families = folder / "analysis" / "specialization.json"
    content = json.loads(families.read_text())
    features = content["features"]
    features["top_tokens"] = [[EVIL] for _ in features["top_tokens"]]
    content["clusters"] = [{**c, "name": EVIL} for c in content["clusters"]]
    families.write_text(json.dumps(content))
    return folder
