"""status.html: a page of a sweep from its files, and how it is written again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from state_folders import NOW, write_final, write_state, write_sweep

from tcsae.launch.telling import StatusPage
from tcsae.report.status_page import write_status_page
from tcsae.runs.status import find_groups
from tcsae.status import main


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """One job each: done, failed, running, waiting at Slurm, and one named to break a page."""
    names = ["lambda=0", "lambda=1", "lambda=2", "lambda=3", "<script>alert(1)</script>"]
    packs = [{"jobs": [n], "job_id": f"987654_{n}"} for n in range(5)]
    sent = {"packs": packs, "closing_job_id": None}
    folder = write_sweep(tmp_path / "grid", names, submissions=[sent])
    write_final(folder / "run-0", final_loss=0.25, wall_seconds=100.0, tokens_per_second=5e4)
    (folder / "run-0" / "report.html").write_text("a page")
    write_state(folder / "run-1", state="failed", message="not finite at step 0")
    write_state(folder / "run-2")
    write_state(folder / "run-3", state="queued", attempt=0, slurm_job_id="987654_3")
    return folder


def rows(page: str) -> dict[str, str]:
    """The words of every row of the table, by number."""
    found = re.findall(r'<tr class="\w+">(.*?)</tr>', page, re.DOTALL)
    texts = [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in found]
    return {text.split()[0]: text for text in texts}


def test_the_page_says_what_every_job_does(sweep: Path) -> None:
    (group,) = find_groups([sweep], now=NOW + 2)
    said = {"987654_3": "pending (Resources)", "987654_2": "running"}
    page = write_status_page(group, said).read_text(encoding="utf-8")
    found = rows(page)
    assert found["0"].startswith("0 lambda=0 done - 100 % 50,000 - 0.25")
    assert found["1"].startswith("1 lambda=1 failed not finite at step 0")
    assert found["2"].startswith("2 lambda=2 running train 25 % 10 1 min")
    assert found["3"].startswith("3 lambda=3 queued pending (Resources)")
    assert found["4"].startswith("4 &lt;script&gt;alert(1)&lt;/script&gt; queued")
    assert '<a href="run-0/report.html">lambda=0</a>' in page and page.count("report.html") == 1
    assert "1 done, 1 failed, 1 running, 2 queued" in page and "20 % of 5 jobs done" in page
    assert '<meta http-equiv="refresh" content="30">' in page
    assert "python -m tcsae.status" in page and "--failed" in page  # what to do
    assert "http://" not in page and "https://" not in page and "<script>alert" not in page


def test_a_page_that_is_not_written_again_is_not_read_again(sweep: Path) -> None:
    (group,) = find_groups([sweep], now=NOW + 2)
    page = write_status_page(group, {}, again=False).read_text(encoding="utf-8")
    assert "http-equiv" not in page and "read again" not in page


def test_the_command_writes_it_once_or_until_all_have_ended(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no Slurm
    main([str(sweep), "--html"])
    assert capsys.readouterr().out == f"{sweep / 'status.html'}\n"
    assert "http-equiv" not in (sweep / "status.html").read_text()
    for n in (2, 3, 4):
        write_final(sweep / f"run-{n}")
    main([str(sweep), "--html", "--watch", "5"])
    assert capsys.readouterr().out.endswith("status.html: all have ended\n")
    assert "4 done, 1 failed" in (sweep / "status.html").read_text()
    assert [path.name for path in sweep.iterdir() if path.name.endswith(".tmp")] == []
    with pytest.raises(SystemExit):
        main([str(sweep), "--html", "--json"])
    assert "--html goes with --watch alone" in capsys.readouterr().err


def test_a_command_that_waits_writes_it_now_and_then(
    sweep: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page, file = StatusPage(sweep), sweep / "status.html"
    page.write({"987654_3": "pending (Priority)"})
    assert "pending (Priority)" in file.read_text() and "http-equiv" in file.read_text()
    page.write({"987654_3": "pending (Resources)"})  # too soon
    assert "Resources" not in file.read_text()
    page.write({}, is_last=True)
    assert "pending" not in file.read_text() and "http-equiv" not in file.read_text()
    StatusPage(sweep / "nowhere").write({})
    assert "no status page" in caplog.text
