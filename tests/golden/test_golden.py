"""Names of runs, configs, and the keys and files of a run, against what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import record

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def test_the_configs_are_those_on_record() -> None:
    assert record.configs() == GOLDEN["configs"]


@pytest.fixture(scope="module")
def found(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return json.loads(json.dumps(record.a_run(tiny_gpt2, texts, tmp_path_factory.mktemp("run"))))


@pytest.mark.parametrize("part", sorted(GOLDEN["run"]))
def test_a_run_holds_what_is_on_record(found: dict, part: str) -> None:
    assert found[part] == GOLDEN["run"][part]
