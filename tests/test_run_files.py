"""The names of a run's files: each in one place, and the walk that finds runs by them."""

from __future__ import annotations

import ast
from pathlib import Path

from state_folders import write_sweep

from tcsae.base import run_files
from tcsae.base.run_files import AnalysisFiles, EvalFiles, RunFiles, runs_below
from tcsae.sae.formats.saelens import CFG_NAME, WEIGHTS_NAME

PACKAGE = Path(run_files.__file__).parent.parent
OTHERS = {
    # A language model's or another library's config.json, not a run's.
    "config.json": {
        "model_folder.py",
        "model_facts.py",
        "dictionary_learning.py",
        "sparsify.py",
        "delphi.py",
    },
    # The locks of an activation store and of a model's weights.
    ".lock": {"context_cache.py", "store.py", "weights.py"},
    # Of a dataset that the datasets library saved.
    "state.json": {"corpora.py", "which_files.py"},
    # The SAE's own files, in any folder of SAELens.
    CFG_NAME: {"saelens_cfg.py", "saelens_registry.py", "sparsify.py"},
    WEIGHTS_NAME: {"saelens.py", "saelens_registry.py"},
}


def names() -> set[str]:
    """Every file of a run, by its last name."""
    parts = (RunFiles(""), EvalFiles(Path()), AnalysisFiles(Path()))
    paths = [value for part in parts for value in vars(part).values() if isinstance(value, Path)]
    return {path.name for path in paths if "." in path.name} | {run_files.SWEEP_FILE}


def test_a_file_name_of_a_run_stands_in_one_place() -> None:
    own, found = names(), []
    assert {"config.json", "final_info.json", ".lock", "core.json", "sweep.json"} <= own
    for path in PACKAGE.rglob("*.py"):
        allowed = {name for name, files in OTHERS.items() if path.name in files}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in own - allowed:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value}")
    assert [line for line in found if not line.startswith("base/run_files.py")] == []


def test_the_names_in_sae_are_those_of_saelens() -> None:
    files = RunFiles("run")
    assert files.sae_cfg == files.sae / CFG_NAME
    assert files.sae_weights == files.sae / WEIGHTS_NAME


def test_runs_are_found_by_any_of_their_files_and_sweeps_as_a_whole(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden", "deep/er"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        RunFiles(tmp_path / "runs" / name).state.write_text("{}")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs" / "a")
    sweep = write_sweep(tmp_path / "sweep", ["window=4"])
    (sweep / "run-0").mkdir(exist_ok=True)
    RunFiles(sweep / "run-0").config.write_text("{}")
    found = [path.relative_to(tmp_path).as_posix() for path in runs_below(tmp_path)]
    assert found == ["runs/a", "runs/b", "runs/deep/er", "sweep/run-0"]
    assert list(runs_below(tmp_path, sweeps=True))[-1] == sweep


def test_what_a_folder_says_of_its_run(tmp_path: Path) -> None:
    run = RunFiles(tmp_path)
    assert not run.is_run and not run.has_results
    run.state.touch()
    assert run.is_run and not run.is_begun
    run.config.touch()
    assert run.is_begun and not run.is_finished and not run.has_results
    run.final_info.touch()
    assert run.is_finished and run.has_results and not run.has_pages
    run.notes.touch()
    assert run.has_pages
