"""`python -m tcsae.export`: what is shared, where it goes, and how it refuses."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import digest, environment, leftovers, run_here, small_job
from run_folders import CONFIG, D_IN, F, changed, write_run
from safetensors.numpy import load_file

import tcsae
from tcsae.base.errors import UserError
from tcsae.export import main
from tcsae.jobs.export import FILES, export_run, without_local_paths

RUN_CONFIG = changed(
    model__path="/home/somebody/models/tiny", dataset__path="/data/secret/text", store__dir="/s/st"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", RUN_CONFIG)


def files_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    """The one line that a refused call leaves."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("tcsae: ")
    return line


def rows_of(card: str) -> dict[str, list[str]]:
    """The card's table rows by their first cell."""
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


# ---------------------------------------------------------------- the folder


def test_an_export_loads_with_tcsae_and_with_sae_lens(run: Path, tmp_path: Path) -> None:
    from sae_lens import SAE

    out = export_run(run, tmp_path / "shared" / "out")
    assert files_in(out) == set(FILES)
    x_ND = torch.randn(50, D_IN)
    wanted, ours = tcsae.load_sae(run), tcsae.load_sae(out)
    with torch.no_grad():
        assert torch.equal(ours.encode(x_ND), wanted.encode(x_ND))
        theirs = SAE.load_from_disk(out / "sae")
        torch.testing.assert_close(theirs(x_ND), wanted(x_ND), atol=1e-4, rtol=0)
    weights = "sae/sae_weights.safetensors"
    assert digest(out / weights) == digest(run / weights)
    metadata = theirs.cfg.metadata
    # What SAELens' own trainer says at its end, of held-out text here.
    loaded = tcsae.load_run(run)
    assert metadata.l0 == loaded.core["eval_result_metrics"]["sparsity"]["l0"]
    assert metadata.num_dead_features == int((loaded.per_feature["density"] == 0).sum())
    details = metadata.training_architecture_details
    assert details["k"] == loaded.config.sae.k and details["lambda"] == loaded.config.lambda_
    assert leftovers(tmp_path) == []


def test_the_card_has_the_runs_figures_with_their_intervals(run: Path, tmp_path: Path) -> None:
    card = (export_run(run, tmp_path / "out") / "README.md").read_text()
    rows = rows_of(card)
    core = json.loads((run / "eval" / "core.json").read_text())
    variance = core["eval_result_metrics"]["reconstruction_quality"]["explained_variance"]
    score = core["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"]
    intervals = core["eval_result_unstructured"]["intervals"]
    values = {name.lower(): row for name, row in rows.items()}
    for name, value, interval in (
        ("explained variance", variance, intervals["explained_variance"]),
        ("ce loss score", score, intervals["ce_loss_score"]),
    ):
        (row,) = [row for key, row in values.items() if key.startswith(name)]
        assert abs(float(row[0]) - value) < 6e-4
        low, high = (float(part) for part in row[1].strip("[]").split(","))
        assert abs(low - interval[0]) < 6e-4 and abs(high - interval[1]) < 6e-4
    summary = json.loads((run / "eval" / "consistency.json").read_text())["summary"]["metrics"]
    for name in ("C_2", "C_4", "C_8"):
        shown = rows[f"Window consistency {name}"]
        entry = summary[name]
        assert abs(float(shown[0]) - entry["energy_weighted"]) < 6e-4
        low = float(shown[1].strip("[]").split(",")[0])
        assert abs(low - entry["energy_weighted_interval"][0]) < 6e-4
    assert values["l0"][0] == "4.000"
    assert rows["model"] == ["`test/tiny`"] and rows["layer"] == ["1"]
    assert rows["text"] == ["`files`"]
    assert rows["features"] == [f"{F} on {D_IN} dimensions"]
    assert "load_sae" in card and "SAE.load_from_disk" in card and "## Licence" in card


def test_the_card_begins_with_yaml_that_the_hub_reads(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    card = (export_run(run, tmp_path / "out") / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "saelens" and front["base_model"] == "test/tiny"
    configuration = yaml.safe_load(card.rsplit("```yaml\n", 1)[1].split("```")[0])
    assert configuration["sae"]["k"] == CONFIG["sae"]["k"]


def test_the_card_registers_what_sae_lens_cannot_load_by_itself(run: Path) -> None:
    from tcsae.jobs.model_card import model_card

    cfg = json.loads((run / "sae" / "cfg.json").read_text())
    loaded = tcsae.load_run(run)
    line = "tcsae.register_with_saelens()"
    assert line not in model_card(loaded, cfg)
    assert line in model_card(loaded, {**cfg, "architecture": "persistent"})


def test_a_model_from_a_folder_is_no_base_model(run: Path, tmp_path: Path) -> None:
    card = (export_run(run, tmp_path / "out") / "README.md").read_text()
    assert "base_model" not in card


def test_paths_of_the_machine_stay_behind(run: Path, tmp_path: Path) -> None:
    cfg = json.loads((run / "sae" / "cfg.json").read_text())
    cfg["metadata"]["dataset_path"] = "/data/secret/text"
    (run / "sae" / "cfg.json").write_text(json.dumps(cfg))
    out = export_run(run, tmp_path / "out")
    for name, content in contents(out).items():
        assert b"/home/" not in content and b"secret" not in content, name
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["path"] == "tiny" and config["dataset"]["path"] == "text"
    assert json.loads((out / "sae" / "cfg.json").read_text())["metadata"]["dataset_path"] == "text"
    kept = {"a": ["org/name", 3, None, "blocks.1.hook"], "b": "C:\\data\\me", "c": "~/x/y"}
    assert without_local_paths(kept) == {**kept, "b": "me", "c": "y"}


# ---------------------------------------------------------------- whole or not at all


def test_an_earlier_export_is_replaced(run: Path, tmp_path: Path) -> None:
    out = export_run(run, tmp_path / "out")
    other = write_run(tmp_path / "other", changed(seed=5))
    export_run(other, out)
    assert files_in(out) == set(FILES)
    assert json.loads((out / "config.json").read_text())["seed"] == 5
    assert leftovers(tmp_path) == []


def test_an_empty_folder_is_filled(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    main([str(run), "--output", str(tmp_path / "out")])
    assert files_in(tmp_path / "out") == set(FILES)


def test_a_folder_with_anything_else_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    assert "not empty" in refusal(capsys, run, "--output", mine)
    out = export_run(run, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    assert "notes.txt" in refusal(capsys, run, "--output", out)
    assert contents(out) == before and files_in(mine) == {"thesis.txt"}
    assert "not empty" in refusal(capsys, run, "--output", run)
    assert "is a file" in refusal(capsys, run, "--output", mine / "thesis.txt")


def test_a_failure_on_the_way_leaves_the_earlier_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export_run(run, tmp_path / "out")
    before, replace = contents(out), os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(source).name == "export":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match="disk is full"):
        export_run(run, out)
    assert contents(out) == before and leftovers(tmp_path) == []


def test_what_is_no_finished_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = write_run(tmp_path / "half", finished=False)
    for where in (["--output", tmp_path / "out"], ["--hub", "me/name"]):
        assert "has not finished" in refusal(capsys, half, *where)
        assert "not a run folder" in refusal(capsys, tmp_path, *where)
    broken = write_run(tmp_path / "broken")
    (broken / "sae" / "sae_weights.safetensors").write_bytes(b"short")
    assert "damaged" in refusal(capsys, broken, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []


# ---------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as create_repo and upload_folder use."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self._answer(200, {"url": f"{self.server.url}/me/name"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            commit = {"commitUrl": f"{self.server.url}/me/name/commit/1", "commitOid": "1"}
            return self._answer(200, {**commit, "success": True, "pullRequestUrl": None})
        self._answer(200, {"errors": [], "warnings": []})  # the check of the card's YAML

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/name", "sha": "0", "siblings": []})

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class HubServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def upload(run: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command as users start it: the hub's settings are read when it is imported."""
    home = {"HF_HOME": str(run.parent / "hf"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    given = environment(**{**home, **env})
    command = [sys.executable, "-m", "tcsae.export", str(run), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=120)


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tcsae: "), done.stderr
    return lines[0]


def test_an_upload_is_the_folder_that_an_export_writes(
    run: Path, tmp_path: Path, hub: HubServer
) -> None:
    done = upload(run, "--hub", "me/name", "--private", HF_ENDPOINT=hub.url, HF_TOKEN="hf_right")
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.url}/me/name" in done.stdout
    assert hub.created["name"] == "name" and hub.created["organization"] == "me"
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    local = contents(export_run(run, tmp_path / "out"))
    card = hub.files.pop("README.md").decode()
    assert 'snapshot_download("me/name")' in card
    assert re.search("explained variance", card, re.IGNORECASE)
    local.pop("README.md")
    assert hub.files == local


def test_an_upload_that_cannot_be_says_what_to_do(run: Path, hub: HubServer) -> None:
    assert "hf auth login" in said(upload(run, "--hub", "me/name", HF_ENDPOINT=hub.url))
    token = {"HF_TOKEN": "hf_wrong"}
    refused = said(upload(run, "--hub", "me/name", HF_ENDPOINT=hub.url, **token))
    assert "login was not accepted" in refused
    off = said(upload(run, "--hub", "me/name", HF_HUB_OFFLINE="1", **token))
    assert "HF_HUB_OFFLINE" in off and "--output" in off
    away = said(upload(run, "--hub", "me/name", HF_ENDPOINT="http://127.0.0.1:9", **token))
    assert "cannot reach" in away and "--output" in away
    assert "no name for a repository" in said(upload(run, "--hub", "a/b/c", **token))
    assert hub.files == {}


def test_delphi_finds_the_features_of_the_held_out_text(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    small = small_job(tiny_gpt2, texts, tmp_path / "run", store__dir=str(tmp_path / "store"))
    assert (done := run_here(*small)).code == 0, done.stderr
    main([str(tmp_path / "run"), "--for", "delphi", "--output", str(tmp_path / "out")])
    run = tcsae.load_run(tmp_path / "run")
    (hook,) = (tmp_path / "out" / "latents").iterdir()
    assert hook.name == "blocks.1.hook_resid_post"
    config = json.loads((hook / "config.json").read_text())
    assert config["model_name"] == "test/tiny" and config["ctx_len"] == 16
    # As delphi's TensorBuffer reads them.
    dense = torch.zeros(8, 16, 96)
    files = sorted(hook.glob("*.safetensors"), key=lambda file: int(file.stem.split("_")[0]))
    edges = [tuple(map(int, file.stem.split("_"))) for file in files]
    assert len(edges) == 5 and edges[0][0] == 0 and edges[-1][1] == 95
    assert all(before[1] + 1 == after[0] for before, after in zip(edges, edges[1:], strict=False))
    for file, (first, _) in zip(files, edges, strict=True):
        content = load_file(file)
        assert content["locations"].dtype == "uint16"
        context, position, feature = torch.tensor(content["locations"].astype("int64")).T
        dense[context, position, feature + first] = torch.tensor(content["activations"])
        tokens = torch.tensor(content["tokens"])
    for ids, codes in zip(tokens, dense, strict=True):
        found = run.features(ids)
        wanted = torch.where(found.valid[:, None], found.values, 0)
        torch.testing.assert_close(codes, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run"), "--for", "delphi", "--output", str(tmp_path / "out")])


def test_where_to_export_must_be_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--output", "o", "--hub", "me/name"], ["--output", "o", "--private"]):
        with pytest.raises(SystemExit) as stop:
            main([str(run), *arguments])
        assert stop.value.code == 2
    assert "--private goes with --hub" in capsys.readouterr().err
