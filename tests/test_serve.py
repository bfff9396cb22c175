"""The live view: the real application on a port of its own, with two trained tiny runs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import EVIL
from chrome import Page, chrome
from helpers import REPOSITORY, environment, run_here, small_job

import tcsae
from tcsae.base.errors import UserError
from tcsae.live import server
from tcsae.live.app import LONGEST_TEXT, MOST_STEERED
from tcsae.live.guard import LARGEST_BODY
from tcsae.live.sides import Sides, open_sides
from tcsae.report import side_folder
from tcsae.report.look_page import counterpart
from tcsae.report.run_page import write_run_page
from tcsae.runs.folder import LoadedRun
from tcsae.serve import main

TOKEN = "the-token"
TEXT = "the river walked quietly under the old bridge, stone by stone"


@pytest.fixture(scope="module")
def runs(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs: no loss, and the loss."""
    root = tmp_path_factory.mktemp("serve")
    for name, form, analysis in (("a-loss", "scale_free", "true"), ("b-none", "none", "false")):
        changes = {"consistency": form, "store.dir": str(root / "store")}
        # Long enough that the two are not the same SAE.
        changes |= {"training.tokens": "6144", "evaluation.analysis": analysis}
        done = run_here(*small_job(tiny_gpt2, texts, root / "runs" / name, **changes))
        assert done.code == 0, done.stderr
    return root / "runs"


@pytest.fixture(scope="module")
def sides(runs: Path) -> Sides:
    return open_sides([runs], lambda _: None)


@dataclass(frozen=True)
class Answer:
    status: int
    text: str
    headers: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class Served:
    """The application on its port."""

    port: int

    def ask(
        self, path: str, question: Any = None, token: str | None = TOKEN, **headers: str
    ) -> Answer:
        """A request as a browser on this machine sends it; `headers` with _ for -."""
        there = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = None if question is None else json.dumps(question)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        where = f"/{path}" if token is None else f"/{token}/{path}"
        with contextlib.closing(there):
            there.request("GET" if body is None else "POST", where, body, given)
            answer = there.getresponse()
            text = answer.read().decode()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, text, named)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/{TOKEN}/"


@pytest.fixture(scope="module")
def served(sides: Sides) -> Iterator[Served]:
    with server.listen(0) as listening:
        running = server.server_of(sides, TOKEN)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield Served(listening.getsockname()[1])
        running.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


# ------------------------------------------------------------------------------ what it says


def test_the_runs_lie_in_the_order_of_the_question(served: Served, sides: Sides) -> None:
    about = served.ask("api/runs").json()
    assert [run["name"] for run in about["runs"]] == ["no loss", "loss"] == sides.names
    assert about["lead"] == 1 and about["runs"][1]["folder"] == "a-loss"


def test_a_text_is_read_as_each_run_reads_it(served: Served, runs: Path) -> None:
    answer = served.ask("api/read", {"text": TEXT, "lead": 1, "top": 4, "pins": [[0, 17]]}).json()
    loss, none = tcsae.load_run(runs / "a-loss"), tcsae.load_run(runs / "b-none")
    # Longer than a context: in parts, as training text is.
    found = {0: none.features(TEXT, parted=True), 1: loss.features(TEXT, parted=True)}
    assert answer["tokens"] == found[1].tokens and answer["contexts"] > 1
    assert answer["valid"] == found[1].valid.int().tolist()
    rows = [(row["run"], row["feature"]) for row in answer["rows"]]
    assert rows == [(0, 17), *((1, one.feature) for one in found[1].top(4))]
    for row in answer["rows"]:
        lead = (none, loss)[row["run"]]
        for side in row["sides"]:
            run = (none, loss)[side["run"]]
            same = side["run"] == row["run"]
            nearest = counterpart(row["feature"], lead.sae.W_dec.detach(), run.sae.W_dec.detach())[
                0
            ]
            assert side["feature"] == (row["feature"] if same else nearest)
            strip = found[side["run"]].strip(side["feature"])
            values = torch.where(strip.valid, strip.values, 0)
            assert side["on"] == values.nonzero().flatten().tolist()
            torch.testing.assert_close(
                torch.tensor(side["values"]), values[side["on"]], rtol=1e-3, atol=0
            )
            assert side["facts"].startswith("density ") and side["longest"] == strip.longest
    assert answer["rows"][0]["pinned"] and not answer["rows"][1]["pinned"]


@pytest.mark.parametrize("text", ["a", "\u00ad", "a" * 2_000])
def test_texts_of_any_length_are_read(served: Served, runs: Path, text: str) -> None:
    """One token, one that shows nothing, and more than a hundred contexts."""
    answer = served.ask("api/read", {"text": text, "lead": 1, "pins": [[1, 3]]})
    wanted = tcsae.load_run(runs / "a-loss").features(text, parted=True)
    found = answer.json()
    assert answer.status == 200 and found["tokens"] == wanted.tokens
    assert found["contexts"] == len(wanted.contexts.unique())
    assert [row["feature"] for row in found["rows"]][0] == 3  # the pin, whether it fires or not


def test_steering_is_that_of_the_run(served: Served, runs: Path) -> None:
    run = tcsae.load_run(runs / "a-loss")
    alive = (run.per_feature["mean_activation"] > 0).nonzero().flatten().tolist()
    first = alive[0]
    asked = {"prompt": "the river", "run": 1, "tokens": 8}
    one = served.ask("api/steer", {**asked, "strengths": [[first, 40.0]]}).json()
    own = run.steer("the river", first, 40.0, tokens=8)
    assert (one["plain"], one["steered"]) == (own.plain, own.steered)
    none = served.ask("api/steer", asked).json()
    assert none["steered"] == none["plain"] == own.plain
    both = served.ask("api/steer", {**asked, "strengths": [[j, 40.0] for j in alive[:2]]}).json()
    assert both["values"].keys() == {str(j) for j in alive[:2]}
    drawn = {**asked, "temperature": 1.0, "seed": 3}
    assert served.ask("api/steer", drawn).json() == served.ask("api/steer", drawn).json()


def test_the_map_is_what_was_measured(served: Served, runs: Path) -> None:
    found = served.ask("api/map/0").json()
    run = tcsae.load_run(runs / "b-none")
    assert found["names"] == {"density": "density", "C": "C_4", "L": "L_4"}
    for key, name in found["names"].items():
        got = torch.tensor([float("nan") if x is None else x for x in found["values"][key]])
        torch.testing.assert_close(got, run.per_feature[name], rtol=1e-3, atol=0, equal_nan=True)
    one = served.ask("api/feature/0/5").json()
    assert one["facts"].startswith("density ") and one["page"] == "run/0/report.html#feature-5"


def test_a_runs_page_is_served_in_a_sandbox_and_nothing_beside_it(
    served: Served, runs: Path
) -> None:
    page = served.ask("run/1/report.html")
    assert page.status == 200
    assert page.text == (runs / "a-loss" / "report.html").read_text(encoding="utf-8")
    assert page.headers["content-security-policy"].startswith("sandbox allow-scripts")
    assert "connect-src" not in page.headers["content-security-policy"]
    for path in (
        "run/1/config.json",
        "run/2/report.html",
        "run/1/../../a-loss/config.json",
        "run/-1/report.html",
        "run/1/%2e%2e/config.json",
        "../pyproject.toml",
        "sides.py",
        "assets/live.js",
    ):
        assert served.ask(path).status in (404, 422), path


def test_the_pages_own_files_have_a_strict_policy(served: Served) -> None:
    for name in ("", "live.js", "live.css", "page.css"):
        answer = served.ask(name)
        policy = answer.headers["content-security-policy"]
        assert answer.status == 200 and "unsafe" not in policy and "default-src 'none'" in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "http:" not in answer.text and "https:" not in answer.text  # offline


def test_every_cell_of_the_tour_runs(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TCSAE_TOUR", str(runs))
    cells = json.loads((REPOSITORY / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for i, source in enumerate(code):
        exec(compile(source, f"tour.ipynb, cell {i}", "exec"), names)
    assert names["run"].folder.name == "a-loss" and names["baseline"].folder.name == "b-none"
    assert names["strip"].n_on and len(names["table"]) == 96 and names["steered"].plain
    said = capsys.readouterr().out
    assert "decoder cosine" in said and "explained_variance" in said.replace(" ", "_").lower()
    # Committed without outputs: they would be of one machine.
    assert not any(cell.get("outputs") for cell in cells)


# ------------------------------------------------------------------------------ who may ask


@pytest.mark.parametrize(
    ("headers", "token", "status"),
    [
        ({}, TOKEN, 200),
        ({"Host": "localhost:9000"}, TOKEN, 200),  # through a tunnel
        ({"Host": "evil.example"}, TOKEN, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, TOKEN, 403),
        ({"Host": "localhost:80@evil.example"}, TOKEN, 403),
        ({"Host": ""}, TOKEN, 403),
        ({"Origin": "http://evil.example"}, TOKEN, 403),
        ({"Origin": "null"}, TOKEN, 403),
        ({"Origin": "http://127.0.0.1:1"}, TOKEN, 403),  # another server of this machine
        ({}, None, 403),
        ({}, "", 403),
        ({}, "the-tokeN", 403),
        ({}, "%C3%A9", 403),
    ],
)
def test_who_is_answered(
    served: Served, headers: dict[str, str], token: str | None, status: int
) -> None:
    assert served.ask("api/runs", token=token, **headers).status == status
    refused = served.ask("api/read", {"text": "a"}, token=token, **headers)
    assert refused.status == status
    if status != 200:
        assert "river" not in refused.text and "tokens" not in refused.text


def test_the_pages_own_origin_is_answered(served: Served) -> None:
    own = f"http://127.0.0.1:{served.port}"
    assert served.ask("api/read", {"text": "a"}, Origin=own).status == 200


def test_a_large_body_is_refused_unread(served: Served) -> None:
    head = f"POST /{TOKEN}/api/read HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    large = 10_000_000
    # Not a byte of the text is sent: the answer comes all the same.
    for more in (f"Content-Length: {large}\r\n\r\n", "Content-Length: -5\r\n\r\n"):
        assert _said(served.port, head + more).split()[1] in (b"413", b"400")
    # Without its length said before, it is read as far as the limit.
    chunk = f"{LARGEST_BODY:x}\r\n{'a' * LARGEST_BODY}\r\n"
    said = _said(served.port, f"{head}Transfer-Encoding: chunked\r\n\r\n{chunk}{chunk}")
    assert said.split()[1] == b"413"


def _said(port: int, request: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as there:
        there.sendall(request.encode())
        return there.recv(4096)


@pytest.mark.parametrize(
    ("path", "question", "status", "said"),
    [
        ("read", {"text": "a" * (LONGEST_TEXT + 1)}, 413, "20,001 characters: 20,000 at most"),
        ("read", {"text": " "}, 422, "empty"),
        ("read", {"text": "a \ud800"}, 422, "Invalid JSON"),  # half a character
        ("read", {"text": "a", "lead": 2}, 422, "there are 0 to 1"),
        ("read", {"text": "a", "pins": [[0, 96]]}, 422, "this SAE has 0 to 95"),
        ("read", {"text": "a", "pins": [[0]]}, 422, "at least 2 items"),
        ("read", {"text": 3}, 422, "text: Input should be a valid string"),
        ("read", {"text": "a", "by": "size"}, 422, "'sum', 'peak' or 'longest'"),
        ("read", [], 422, "should be an object"),
        ("steer", {"prompt": "a", "strengths": [[96, 1.0]]}, 422, "this SAE has 0 to 95"),
        ("steer", {"prompt": "a", "tokens": 1000}, 422, "less than or equal to 100"),
        ("steer", {"prompt": "a", "strengths": [[0, 1e9]]}, 422, "less than or equal to 100"),
        (
            "steer",
            {"prompt": "a", "strengths": [[i, 1.0] for i in range(MOST_STEERED + 1)]},
            422,
            "at most 8 items",
        ),
        ("steer", {"prompt": "a" * 5000}, 413, "4,000 at most"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    served: Served, path: str, question: Any, status: int, said: str
) -> None:
    answer = served.ask(f"api/{path}", question)
    assert answer.status == status and said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_two_at_once_are_both_answered(served: Served) -> None:
    found: dict[int, Answer] = {}
    start = threading.Barrier(2)

    def ask(i: int) -> None:
        start.wait(timeout=20)
        text = ("stone by stone", "under the old bridge")[i]
        found[i] = served.ask("api/read", {"text": text, "lead": i})

    threads = [threading.Thread(target=ask, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[i].status for i in (0, 1)] == [200, 200]
    assert "".join(found[0].json()["tokens"]).endswith("stone by stone")
    assert "".join(found[1].json()["tokens"]).endswith("under the old bridge")


# ------------------------------------------------------------------------------ the command


def test_what_does_not_fit_together_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = runs / "a-loss"
    for given, said in (
        ([mine, mine, mine, mine], "4 runs: one to 3"),
        ([tmp_path], "has no runs"),
        ([tmp_path / "nothing"], "is not a folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, given)])
        assert ended.value.code == 2 and said in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main([str(mine), "--port", str(taken.getsockname()[1])])
    assert "cannot be had" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("layer", 2, "reads another model or hook than"),
        ("context_size", 32, "has contexts of 32 tokens, not 16 as"),
    ],
)
def test_runs_of_another_hook_or_context_are_refused_before_the_model_is_loaded(
    runs: Path, tmp_path: Path, key: str, value: int, said: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs / "b-none", other)
    config = json.loads((other / "config.json").read_text())
    (config if key in config else config["dataset"])[key] = value
    (other / "config.json").write_text(json.dumps(config))
    told: list[str] = []
    with pytest.raises(UserError, match=said):
        open_sides([runs / "a-loss", other], told.append)
    assert told == ["opening 2 runs"]


def test_without_the_extra_it_says_how_to_get_it(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "_NEEDED", ("starlette", "no_such_package"))
    with pytest.raises(SystemExit):
        main([str(runs)])
    assert capsys.readouterr().err == (
        "tcsae: the live view needs no_such_package: in the checkout, "
        'pip install -c requirements.lock -e ".[serve]"\n'
    )


def test_ctrl_c_ends_it_quietly(runs: Path) -> None:
    command = [sys.executable, "-m", "tcsae", "serve", str(runs / "a-loss"), str(runs / "b-none")]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[0] == "opening 2 runs\n" and lines[1] == "loading test/tiny\n"
    address = lines[2].split()[1]
    port, _, rest = address.removeprefix("http://127.0.0.1:").partition("/")
    token = rest.strip("/")
    assert len(token) >= 32 and Served(int(port)).ask("api/runs", token=token).status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


# ------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def page(served: Served) -> Iterator[Page]:
    with chrome() as found:
        if found is None:
            pytest.skip("NOT TESTED: the live view in a browser (no Chromium on PATH)")
        found.size(1400)
        found.open(served.address)
        found.wait("document.body.dataset.ready")
        yield found


def test_the_page_in_a_browser(page: Page, served: Served) -> None:
    text = f"{EVIL} the old bridge"
    page.type("#read-text", text)
    page.click("#read")
    page.wait("document.body.dataset.read === '1'")
    shown = page.run("document.querySelector('.side .context-text').textContent")
    written = shown.replace("·", " ").replace("<s>", "")  # the BOS of every context
    assert written == text and not page.run("document.images.length")
    names = "[...document.querySelectorAll('.row:first-child h4')].map(e => e.textContent)"
    assert [name.split(":")[0] for name in page.run(names)] == ["no loss", "loss"]
    # A token under the pointer.
    page.move(".lead-side .on")
    page.wait("/ at [0-9]+: [0-9.]+ \\(loss, feature/.test(where.textContent)")
    # A pin, and rows of the other run.
    lead = page.run("document.querySelector('.row').dataset.row")
    page.click(".row .row-head button")
    page.wait("document.body.dataset.read === '2' && pins.children.length === 1")
    assert page.run("document.querySelector('.row').dataset.row") == lead
    page.run("lead.value = '0'; lead.dispatchEvent(new Event('change'))")
    page.wait("document.body.dataset.read === '3'")
    rows = page.run("[...document.querySelectorAll('.row')].map(e => e.dataset.row)")
    assert rows[0] == lead and all(row.startswith("0-") for row in rows[1:]) and len(rows) > 1
    assert page.messages == []


def test_a_slider_moves_the_continuation(page: Page, sides: Sides) -> None:
    run = sides.opened[1]
    assert isinstance(run, LoadedRun)
    strongest = int(run.per_feature["mean_activation"].nan_to_num().argmax())
    page.type("#prompt", "the river walked")
    page.run("document.querySelector('#steer-run').value = '1'")
    page.type("#new-tokens", "12")
    page.type("#steer-number", str(strongest))
    page.click("#steer-add")
    page.wait("sliders.children.length === 1")
    page.run(f"document.querySelector('#slider-{strongest}').focus()")
    page.key("Home", 36)
    page.wait("document.body.dataset.steered")
    assert page.run("document.querySelector('output').textContent") == "-5 ×"
    first = page.run("[plain.textContent, steered.textContent]")
    page.key("End", 35)
    page.wait(f"steered.textContent !== {json.dumps(first[1])}")
    assert page.run("document.querySelector('output').textContent") == "20 ×"
    assert page.run("plain.textContent") == first[0] and first[0].startswith("the river walked")
    assert page.messages == []


def test_a_click_on_the_map_shows_a_feature_and_its_page(page: Page, served: Served) -> None:
    page.run("document.querySelector('#map-canvas').focus()")
    page.key("ArrowRight", 39)
    page.wait("document.querySelector('#map-feature a')")
    link = page.run("document.querySelector('#map-feature a').href")
    assert link.startswith(f"{served.address}run/1/report.html#feature-")
    before = page.run("pins.children.length")
    page.click("#map-feature button")
    page.wait(f"pins.children.length === {before + 1}")
    assert page.messages == []
    page.open(link)
    page.wait("document.body.dataset.drawn === 'all'")
    page.wait("document.querySelector('dialog[open]')")
    assert page.messages == []
    page.open(served.address)
    page.wait("document.body.dataset.ready")


def test_a_large_runs_page_reads_its_features_from_the_folder_beside_it(
    page: Page, served: Served, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tcsae.load_run(runs / "a-loss")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(side_folder, "ONE_FILE_FEATURES", 5)
            report = write_run_page(run, runs / "a-loss" / "report.html")
        feature = int(run.per_feature["density"].argmax())
        page.open(f"{served.address}run/1/report.html#feature-{feature}")
        page.wait("document.querySelectorAll('#feature .context').length")
        parts = sorted((runs / "a-loss" / "report_features").glob("*/*.js"))
        own = f"run/1/report_features/{parts[0].parent.name}"
        assert page.requests[-1] == f"{served.address}{own}/0000.js"
        assert page.messages == []
        assert served.ask(f"{own}/words.js").text == parts[-1].read_text(encoding="utf-8")
        for path in (
            f"{own}/0009.js",
            f"{own}/../report.html",
            f"{own}/%2e%2e%2f%2e%2e%2fconfig.json",
        ):
            assert served.ask(path).status == 404, path
    finally:
        write_run_page(run, report)
        page.open(served.address)
        page.wait("document.body.dataset.ready")


@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_stands_out_of_the_page(page: Page, width: int, tmp_path: Path) -> None:
    page.size(width)
    page.open(page.run("location.href"))
    page.wait("document.body.dataset.ready")
    page.type("#read-text", "the river walked " + "a" * 300)
    page.click("#read")
    page.wait("document.body.dataset.read")
    assert page.run("document.documentElement.scrollWidth") <= width and page.beyond() == []
    if where := os.environ.get("TCSAE_PICTURES"):
        page.picture(Path(where) / f"tiny-{width}.png")
    assert page.messages == []


def test_a_finger_learns_what_a_pointer_does(page: Page, served: Served) -> None:
    page.size(390, 800)
    page.touch()
    try:
        page.open(served.address)
        page.wait("document.body.dataset.ready")
        unpointed = page.run("where.textContent")
        page.type("#read-text", TEXT)
        page.tap("#read")
        page.wait("document.body.dataset.read")
        page.tap(".lead-side .on")
        page.wait("/ at [0-9]+: [0-9.]+ \\(loss, feature/.test(where.textContent)")
        at = page.run("where.textContent")
        page.swipe(".row:last-child canvas", up=200)
        page.swipe(".row:nth-child(2) .context-text", up=200)
        assert page.run("where.textContent") == at and not page.run("getSelection().toString()")
        page.tap("#strips h2")
        page.wait(f"where.textContent === {json.dumps(unpointed)}")
        assert page.run("document.querySelectorAll('.here').length") == 0
        page.tap(".lead-side canvas")
        page.wait("/ at [0-9]+: /.test(where.textContent)")
        assert page.beyond() == [] and page.messages == []
    finally:
        page.touch(on=False)
