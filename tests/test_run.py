"""A run folder: recognised, repeated, refused, read back; tracking that never stands in the way."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    count_calls,
    leftovers,
    metric_lines,
    run_here,
    small_config,
    small_job,
    weights_digest,
    write_texts,
)
from hypothesis import given
from hypothesis import strategies as st

import tcsae
from tcsae.base.apart import Apart
from tcsae.base.errors import Interrupted, UserError
from tcsae.base.files import locked
from tcsae.base.run_files import RunFiles
from tcsae.base.signals import stop_on_signal
from tcsae.config import Config
from tcsae.data.language_model import LanguageModel
from tcsae.jobs import side_by_side
from tcsae.jobs.bank import run, run_bank
from tcsae.jobs.tracking import JsonLines
from tcsae.launch.jobs import GridJob
from tcsae.launch.worker import work
from tcsae.measure import evaluation
from tcsae.measure.evaluation import ENCODE_CONTEXTS
from tcsae.report.contents import Contents
from tcsae.report.run_page import run_figures
from tcsae.runs import folder as run_folder
from tcsae.runs.state import read_state
from tcsae.training.member import Member


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def arguments(tiny_gpt2: Path, texts: Path, store: Path) -> Callable[..., list[str]]:
    def build(folder: Path, **changes: str) -> list[str]:
        fixed = {"store__dir": str(store), "layer": "1"}
        return small_job(tiny_gpt2, texts, folder, **fixed, **changes)

    return build


@pytest.fixture
def config(tiny_gpt2: Path, texts: Path, store: Path) -> Config:
    return small_config(tiny_gpt2, texts, store__dir=str(store), layer="1")


@pytest.fixture(scope="module")
def finished(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, only to be looked at."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    outcome = run_here(*arguments(folder))
    assert outcome.code == 0, outcome.stderr
    return folder


# ------------------------------------------------------------------------------- the folder


def test_a_run_leaves_what_a_researcher_needs_and_nothing_else(finished: Path) -> None:
    for name in (
        ".hydra/config.yaml",
        "config.json",
        "metrics.jsonl",
        "train.log",
        "sae/cfg.json",
        "sae/sae_weights.safetensors",
        "eval/core.json",
        "eval/consistency.json",
        "final_info.json",
    ):
        assert (finished / name).is_file(), name
    assert leftovers(finished) == []


def test_metrics_are_lines_of_json_with_step_terms_and_the_figures_of_the_issue(
    finished: Path,
) -> None:
    lines = metric_lines(finished)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    wanted = {
        "loss/total",
        "loss/reconstruction",
        "loss/consistency",
        "l0",
        "explained_variance",
        "window_variance",
        "window_consistency",
        "dead_share",
        "lr",
        "lambda",
        "tokens",
    }
    for line in lines:
        assert wanted <= set(line)
        assert all(isinstance(value, (int, float)) for value in line.values())
    raw = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert raw["tokens_per_second"] > 0


def test_final_info_counts_the_steps_that_the_optimizer_took(finished: Path) -> None:
    info = json.loads((finished / "final_info.json").read_text())
    assert info["training_steps"] == 12
    assert info["tokens"] <= 12 * 8 * 15  # position 0 is no token of the text
    assert info["final_loss"] == metric_lines(finished)[-1]["loss/total"]
    assert (info["window_size"], info["lambda"], info["layer"]) == (4, 0.1, 1)


def test_final_info_says_where_the_time_went(finished: Path) -> None:
    info = json.loads((finished / "final_info.json").read_text())
    seconds = info["seconds"]
    assert list(seconds["shared"]) == ["harvest", "train", "evaluate model"]
    assert list(seconds["own"]) == ["evaluate features", "intervals"]  # no analysis was asked for
    parts = [*seconds["shared"].values(), *seconds["own"].values()]
    assert min(parts) > 0 and sum(parts) <= info["wall_seconds"]
    assert seconds["shared"]["train"] >= info["training_seconds"]
    said = re.search(r"where the time went: (.+)", (finished / "train.log").read_text())
    assert said is not None and re.search(r"\b[a-z]+ [\d.]+ s", said[1])


def test_a_run_without_a_step_is_an_error(config: Config, tmp_path: Path) -> None:
    class Idle(Member):
        def train_step(self, *_: Any) -> None:
            self.step += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcsae.jobs.job.Member", Idle)
        # No figure of a run without training may ever look like a result.
        with pytest.raises(RuntimeError, match="no step"):
            run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "final_info.json").exists()


def test_load_run_gives_config_sae_and_metrics(finished: Path, config: Config) -> None:
    loaded = tcsae.load_run(finished)
    assert loaded.config.training == config.training
    assert loaded.sae.W_enc.shape == (48, 96)
    assert loaded.final_info["training_steps"] == 12
    assert len(loaded.metrics) == 6
    assert torch.equal(tcsae.load_sae(finished).W_dec, loaded.sae.W_dec)
    assert torch.equal(tcsae.load_sae(finished / "sae").W_dec, loaded.sae.W_dec)


def test_load_run_of_what_is_no_finished_run_says_so(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        tcsae.load_run(tmp_path)
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    with pytest.raises(UserError, match="has not finished: it was stopped; run its"):
        tcsae.load_run(tmp_path)


# ---------------------------------------------------------------------- the same run once more


def test_a_finished_run_is_recognised_at_once(
    finished: Path, arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count_calls(Member, "train_step", monkeypatch)
    models = count_calls(LanguageModel, "__init__", monkeypatch)
    before = {f: f.read_bytes() for f in finished.glob("*.json*")}
    started = time.monotonic()
    outcome = run_here(*arguments(finished))
    assert outcome.code == 0
    assert "already finished" in outcome.stdout and "rerun=true" in outcome.stdout
    assert steps == [] and models == []
    assert time.monotonic() - started < 5
    assert {f: f.read_bytes() for f in finished.glob("*.json*")} == before


@pytest.mark.parametrize(("name", "key"), [("text", "dataset.path="), ("weights", "model.path=")])
def test_a_finished_run_of_other_content_is_not_passed_for_this_one(
    name: str, key: str, finished: Path, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    content = json.loads((run / "content.json").read_text())
    assert content.keys() == {"text", "weights", "training_contexts", "held_out_contexts"}
    (run / "content.json").write_text(json.dumps(content | {name: "of what was there before"}))
    outcome = run_here(*arguments(run))
    assert outcome.code == 2
    assert f"of what was there before: {key}" in outcome.refusal()
    assert "rerun=true repeats it" in outcome.refusal()


def test_rerun_repeats_a_finished_run_with_the_same_result(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert run_here(*arguments(folder)).code == 0
    first = weights_digest(folder), metric_lines(folder)
    steps = count_calls(Member, "train_step", monkeypatch)
    assert run_here(*arguments(folder), "rerun=true").code == 0
    assert len(steps) == 12
    assert (weights_digest(folder), metric_lines(folder)) == first


def test_a_repetition_that_is_interrupted_goes_on_where_it_was(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert run_here(*arguments(folder)).code == 0
    first = weights_digest(folder)
    original = Member.train_step
    with monkeypatch.context() as patch:

        def signalled(self: Member, *args: Any) -> Any:
            if self.step == 6:
                signal.raise_signal(signal.SIGTERM)
            return original(self, *args)

        patch.setattr(Member, "train_step", signalled)
        assert run_here(*arguments(folder), "rerun=true").code == 75
    steps = count_calls(Member, "train_step", monkeypatch)
    assert run_here(*arguments(folder), "rerun=true").code == 0
    assert len(steps) == 5
    assert weights_digest(folder) == first


def test_another_config_in_the_same_folder_is_refused(
    finished: Path, arguments: Callable[..., list[str]]
) -> None:
    before = weights_digest(finished)
    line = run_here(*arguments(finished, window="8")).refusal()
    assert str(finished) in line and "holds another run" in line
    assert "choose another folder or remove it" in line
    assert weights_digest(finished) == before
    assert run_here(*arguments(finished)).code == 0


def test_a_run_does_not_go_on_with_other_text_under_the_same_path(
    tiny_gpt2: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    text = write_texts(tmp_path / "texts")
    config = small_config(tiny_gpt2, text, store__dir=str(store), layer="1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tcsae.jobs.finish.evaluate", die)
        run(config, tmp_path / "run")
    write_texts(text, seed=1)
    with pytest.raises(UserError, match="begun with other content .*training_contexts"):
        run(config, tmp_path / "run")
    write_texts(text)
    assert run(config, tmp_path / "run")["training_steps"] == config.steps


def test_where_it_is_written_and_tracked_is_not_another_config(
    finished: Path, arguments: Callable[..., list[str]]
) -> None:
    assert run_here(*arguments(finished, store="stream"), "name=mine").code == 0


def test_a_folder_that_another_process_works_in_is_refused(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    import fcntl

    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        line = run_here(*arguments(folder)).refusal()
        assert f"{folder} is in use by another process" in line
    with locked(folder / ".lock"):
        pass
    assert run_here(*arguments(folder)).code == 0


def test_a_second_ctrl_c_stops_at_once_and_costs_one_interval_at_most(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Member.train_step

    def impatient(self: Member, *args: Any) -> Any:
        if self.step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "train_step", impatient)
        outcome = run_here(*arguments(tmp_path / "run"))
    assert outcome.code == 130
    assert "stopped at once; the same command goes on" in outcome.refusal()
    steps = count_calls(Member, "train_step", monkeypatch)
    assert run_here(*arguments(tmp_path / "run")).code == 0
    assert len(steps) == 8


# ------------------------------------------------------------------------------- metrics.jsonl


metric = st.floats(width=32)


@given(st.lists(st.dictionaries(st.text(min_size=1, max_size=5), metric, max_size=4), max_size=8))
def test_every_line_is_json_whatever_the_metrics_are(rows: list[dict[str, float]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        lines = JsonLines(Path(folder) / "metrics.jsonl")
        for step, row in enumerate(rows, 1):
            lines.log({k: v for k, v in row.items() if k != "step"}, step)
        text = lines.path.read_text() if rows else ""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        read = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
        assert [row["step"] for row in read] == list(range(1, len(rows) + 1))


@given(cut=st.integers(0, 200), step=st.integers(0, 12))
def test_what_came_after_a_checkpoint_is_forgotten_and_so_is_half_a_line(
    cut: int, step: int
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        lines = JsonLines(Path(folder) / "metrics.jsonl")
        for number in range(1, 11):
            lines.log({"loss": number / 7}, number)
        whole = lines.path.read_text()
        lines.path.write_text(whole[: len(whole) - cut])
        left = [line for line in whole[: len(whole) - cut].splitlines() if line.endswith("}")]
        lines.rewind(step)
        assert lines.path.read_text().splitlines() == left[:step]
        lines.log({"loss": 0.0}, step + 1)
        assert json.loads(lines.path.read_text().splitlines()[-1])["step"] == step + 1


# ------------------------------------------------------------------------------------ W&B


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no W&B today")


def no_module(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)


def no_init(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import wandb

    monkeypatch.setattr(wandb, "init", fails)


def no_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir()
    (folder / "wandb").write_text("a file where the folder should be")


def no_log(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import wandb

    class Run:
        define_metric = staticmethod(lambda *_, **__: None)
        log = staticmethod(fails)
        finish = staticmethod(fails)

    monkeypatch.setattr(wandb, "init", lambda **_: Run())


@pytest.mark.parametrize("failure", [no_module, no_init, no_folder, no_log])
def test_a_failure_of_wandb_is_a_warning_and_no_more(
    failure: Callable[[pytest.MonkeyPatch, Path], None],
    finished: Path,
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failure(monkeypatch, tmp_path / "run")
    outcome = run_here(*arguments(tmp_path / "run", tracking="offline"))
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.count("W&B is off for the rest of this run") == 1
    assert outcome.messages == []
    assert metric_lines(tmp_path / "run") == metric_lines(finished)
    assert weights_digest(tmp_path / "run") == weights_digest(finished)


def test_wandb_offline_leaves_a_run_that_can_be_synced(
    finished: Path, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    outcome = run_here(*arguments(tmp_path / "run", tracking="offline"))
    assert outcome.code == 0, outcome.stderr
    assert "W&B is off" not in outcome.stdout
    assert outcome.messages == []
    (records,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20
    while records.stat().st_size < 1000:  # W&B's own process writes it, a little later
        assert time.monotonic() < deadline
    assert metric_lines(tmp_path / "run") == metric_lines(finished)


def test_wandb_gets_the_figures_and_the_table_of_the_report(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    outcome = run_here(*arguments(tmp_path / "run", tracking="offline"))
    assert "W&B is off" not in outcome.stdout
    (media,) = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media")
    (table_file,) = media.rglob("report/features_*.table.json")
    table = json.loads(table_file.read_text())
    loaded = tcsae.load_run(tmp_path / "run")
    densities = [row[table["columns"].index("density")] for row in table["data"]]
    assert densities == loaded.consistency["per_feature"]["density"]
    sent = [file.name for file in media.rglob("report/*.plotly.json")]
    for name in run_figures(Contents.of(loaded)):
        assert any(file.startswith(f"{name}_") for file in sent), name


def test_a_run_is_read_once_for_all_its_pages(
    arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = count_calls(run_folder, "load_sae", monkeypatch)
    tensors = count_calls(run_folder, "load_tensors", monkeypatch)
    run_here(*arguments(tmp_path / "run", tracking="offline"))
    assert (tmp_path / "run" / "notes.txt").is_file()
    assert [called[0] for called in saes] == [tmp_path / "run" / "sae"]
    assert [called[0].name for called in tensors] == ["per_feature.safetensors"]


def test_without_tracking_there_is_no_wandb_folder(finished: Path) -> None:
    assert not (finished / "wandb").exists()


def test_a_signal_before_the_first_step_is_obeyed_after_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Member.train_step

    def signalled(self: Member, *args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(Member, "train_step", signalled)
    with pytest.raises(Interrupted, match="everything up to here is saved"):
        run(config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint" / "step-00000001.safetensors").is_file()


# ---------------------------------------------------------------------------- a bank's measures


def analysed(config: Config, *weights: float) -> list[Config]:
    evaluation = config.evaluation.model_copy(update={"analysis": True})
    changes = [{"lambda_": weight, "evaluation": evaluation} for weight in weights]
    return [config.model_copy(update=change) for change in changes]


def test_a_bank_measures_each_as_alone_and_the_model_itself_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = analysed(config, 0.0, 1.0)
    for i, member in enumerate(bank):
        run(member, tmp_path / f"alone{i}")
    monkeypatch.setattr(side_by_side, "cores", lambda: 2)
    monkeypatch.setattr("tcsae.measure.analysis.WORTH_A_PROCESS", 0)
    scores = count_calls(evaluation, "score_forward", monkeypatch)
    apart = count_calls(Apart, "__call__", monkeypatch)
    jobs = [(member, tmp_path / f"bank{i}") for i, member in enumerate(bank)]
    with stop_on_signal() as stop:
        outcomes = run_bank(jobs, stop)
    assert [outcome.error for outcome in outcomes] == [None] * 2
    n_batches = -(-config.evaluation.model_contexts // ENCODE_CONTEXTS)
    assert len(scores) == (1 + len(bank)) * n_batches and len(apart) == 2
    for i in range(len(bank)):
        alone, beside = (measured(tmp_path / f"{where}{i}") for where in ("alone", "bank"))
        assert alone == beside and len(alone) > 10
    losses = [outcome.info["metrics"]["model_performance_preservation"] for outcome in outcomes]
    assert losses[0]["ce_loss_with_sae"] != losses[1]["ce_loss_with_sae"]
    seconds = outcomes[1].info["seconds"]
    assert {"evaluate features", "intervals", "analyse features", "clusters"} <= set(seconds["own"])


def measured(folder: Path) -> dict[str, Any]:
    """All that is measured of a run, to the last bit."""
    found: dict[str, Any] = {}
    for part in ("eval", "analysis"):
        for file in sorted((folder / part).iterdir()):
            found[file.name] = file.read_bytes()
    found["core.json"] = json.loads(found["core.json"])["eval_result_metrics"]
    return found


def test_a_job_that_fails_at_its_measurements_stops_no_other_and_a_signal_stops_all(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "cores", lambda: 2)
    jobs = [(c, tmp_path / f"{i}") for i, c in enumerate(analysed(config, 0.0, 0.1, 1.0))]
    original, steps = evaluation.on_activations, count_calls(Member, "train_step", monkeypatch)

    def disturbed(how: Callable[[int], None]) -> None:
        started = []

        def seen(*args: Any) -> Any:
            started.append(args)
            how(len(started))
            return original(*args)

        monkeypatch.setattr(evaluation, "on_activations", seen)

    def signalled(number: int) -> None:
        if number == 1:
            stop.signal_name = "SIGUSR2"

    def failing(number: int) -> None:
        if number == 2:
            raise ValueError("no measure")

    disturbed(signalled)
    with stop_on_signal() as stop, pytest.raises(Interrupted):
        run_bank(jobs, stop)
    states = [read_state(folder) for _, folder in jobs]
    assert [state.state for state in states if state] == ["interrupted"] * 3
    n_steps = len(steps)
    disturbed(failing)
    with stop_on_signal() as stop:
        outcomes = run_bank(jobs, stop)
    assert [str(o.error) for o in outcomes if o.error] == ["no measure"]
    failed = [outcome.error is not None for outcome in outcomes]
    assert [RunFiles(folder).has_pages for _, folder in jobs] == [not f for f in failed]
    assert [(read_state(f).state == "failed") for _, f in jobs] == failed  # type: ignore[union-attr]
    disturbed(lambda number: None)
    with stop_on_signal() as stop:
        outcomes = run_bank(jobs, stop)
    assert [outcome.repeated for outcome in outcomes] == failed
    assert len(steps) == n_steps  # nothing was trained again


def test_a_job_without_a_place_for_its_folder_leaves_the_others_of_its_pack_alone(
    config: Config, tmp_path: Path
) -> None:
    (tmp_path / "0").write_text("in the way")
    pack = [
        GridJob(i, f"job {i}", (), config, tmp_path / f"{i}", {"overrides.yaml": "[]\n"})
        for i in range(2)
    ]
    with stop_on_signal() as stop:
        errors = work(pack, stop)
    assert list(errors) == [0] and "0" in str(errors[0])
    assert RunFiles(tmp_path / "1").has_pages
    with stop_on_signal() as stop:
        assert list(work(pack[:1], stop)) == [0]


def test_jobs_of_different_streams_are_no_bank(config: Config, tmp_path: Path) -> None:
    longer = config.training.model_copy(update={"batch_contexts": 16})
    other = config.model_copy(update={"layer": 0, "training": longer})
    jobs = [(config, tmp_path / "one"), (other, tmp_path / "other")]
    with stop_on_signal() as stop, pytest.raises(ValueError, match="layer, training.batch_cont"):
        run_bank(jobs, stop)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_job_says_so_while_the_others_train_on(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, seen = Member.train_step, []

    def fails(self: Member, *args: Any) -> Any:
        if self.config.lambda_ == 1.0 and self.step == 2:
            raise MemoryError("no room")
        seen.append(read_state(tmp_path / "bad"))
        return train_step(self, *args)

    monkeypatch.setattr(Member, "train_step", fails)
    bank = [config.model_copy(update={"lambda_": weight}) for weight in (0.0, 1.0)]
    with stop_on_signal() as stop:
        good, bad = run_bank([(bank[0], tmp_path / "good"), (bank[1], tmp_path / "bad")], stop)
    assert good.error is None and isinstance(bad.error, MemoryError)
    assert [state.state for state in seen if state][-1] == "failed"
    last = read_state(tmp_path / "bad")
    assert last and last.state == "failed" and last.message == "no room"
    assert RunFiles(tmp_path / "good").has_pages and not RunFiles(tmp_path / "bad").is_finished
