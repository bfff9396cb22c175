"""A page of many features, its parts in a folder beside it: opened as a file, in Chromium."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import EVIL, Tags, page_of
from chrome import Page, chrome
from helpers import REPOSITORY

from tcsae.base.files import read_json
from tcsae.base.run_files import RunFiles
from tcsae.jobs.tracking import _REPORT_FILES
from tcsae.report import side_folder
from tcsae.report.contents import Contents
from tcsae.report.index_page import write_index
from tcsae.report.run_page import write_run_page
from tcsae.runs.folder import load_run

sys.path.insert(0, str(REPOSITORY / "scripts"))

import page_scale  # noqa: E402

PART = 20


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_folder, "ONE_FILE_FEATURES", 95)
        patch.setattr(side_folder, "PART", PART)
        yield


@pytest.fixture(scope="module")
def page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside") / "run"
    shutil.copytree(run_folder, folder)
    return page_of(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page | None]:
    with chrome() as tab:
        yield tab


@pytest.fixture
def tab(browser: Page | None) -> Page:
    if browser is None:
        pytest.skip("no Chromium on PATH")
    browser.open("about:blank")
    browser.messages.clear()
    browser.requests.clear()
    return browser


def beside(page: Path) -> list[str]:
    folder = page.parent / "report_features"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.js"))


def opened(tab: Page, address: str) -> None:
    tab.open(address)
    tab.wait("document.querySelector('#features-body tr')")


def search(tab: Page, text: str, done: str = "true") -> tuple[list[int], str]:
    """(the features listed, what is said of them)."""
    tab.type("#features-search", text)
    said = "document.querySelector('#features-count').textContent"
    tab.wait(f"!{said}.includes('reading') && {done}")
    rows = "[...document.querySelectorAll('#features-body tr')].map((row) => +row.dataset.feature)"
    return tab.run(rows), tab.run(said)


def filled(feature: int) -> str:
    return (
        f"document.querySelector('#feature-title').textContent.startsWith('Feature {feature}') && "
        "!document.querySelector('#feature').classList.contains('waiting') && "
        "document.querySelectorAll('#feature .main-svg').length"
    )


def test_parts_lie_beside_the_page_under_a_name_of_their_own(page: Path) -> None:
    (own,) = {Path(name).parent.name for name in beside(page)}
    assert [Path(name).name for name in beside(page)] == [
        *(f"{i:04d}.js" for i in range(5)),
        "words.js",
    ]
    html = page.read_text(encoding="utf-8")
    assert f"report_features/{own}" in html and "copy the two together" in html
    assert not [p for p in page.parent.iterdir() if p.name.endswith(".tmp")]


def test_a_page_with_few_features_is_one_file(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(page.parent, tmp_path / "run")
    monkeypatch.setattr(side_folder, "ONE_FILE_FEATURES", 96)
    alone = page_of(tmp_path / "run")
    assert beside(alone) == [] and not (alone.parent / "report_features").exists()
    assert "report_features" not in alone.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_feature_of_a_part_not_yet_read_opens_by_its_link(page: Path, tab: Page) -> None:
    contents = Contents.of(load_run(page.parent))
    feature = 40 + int(contents.values["density"][40:60].argmax())
    opened(tab, f"file://{page}#feature-{feature}")
    tab.wait(filled(feature))
    tensors = contents.analysis.top_contexts
    n_contexts = int((tensors["context"][feature] >= 0).sum())
    assert tab.run("document.querySelectorAll('#feature .context').length") == n_contexts > 0
    title = tab.run("document.querySelector('#feature mark.peak').title")
    largest = float(tensors["value"][feature, 0])
    assert float(title.split()[0]) == pytest.approx(largest, abs=0.002)
    # One part was read, from the disk, and nothing else.
    (own,) = tab.requests
    assert own.startswith("file://") and own.endswith("/0002.js")
    # On with the keys, into whatever parts the next ones are of; back leads to the same.
    for key, code in (("ArrowRight", 39), ("ArrowRight", 39), ("ArrowLeft", 37), ("ArrowLeft", 37)):
        tab.key(key, code)
    tab.wait(filled(feature))
    assert tab.run("location.hash") == f"#feature-{feature}"
    tab.run("location.hash = '#feature-95'")
    tab.wait(filled(95))
    assert {name.partition(":")[0] for name in tab.requests} == {"file"}
    assert tab.messages == []


@pytest.mark.slow
def test_the_search_finds_in_parts_not_yet_read(page: Path, tab: Page) -> None:
    contents = Contents.of(load_run(page.parent))
    opened(tab, f"file://{page}")
    assert 77 in search(tab, "77")[0]
    density, C = contents.values["density"], contents.values[str(contents.window_metric)]
    found, said = search(tab, "C>.01 density<0.05")
    want = {i for i in range(96) if C[i] > 0.01 and density[i] < 0.05}
    assert set(found) == want and said.startswith(f"{len(want)} of 96 features")
    assert tab.requests == []
    # A word that no feature is named by, from the middle of a context.
    word, features = rare_word(contents)
    found, said = search(tab, word)
    assert set(found) == features
    assert said == f"{len(features)} of 96 features; {len(features)} of them by their contexts"
    assert [Path(name).name for name in tab.requests] == ["words.js"]
    assert set(search(tab, f"{word} density<0.05")[0]) == {f for f in features if density[f] < 0.05}
    tab.run("document.querySelector('#features-head [data-key=density] button').click()")
    order = search(tab, "")[0]
    values = density[order]
    assert (values[:-1] >= values[1:]).all() and sorted(order) == list(range(96))
    assert tab.messages == []


@pytest.mark.slow
def test_a_page_of_one_file_searches_the_same_words(
    page: Path, run_folder: Path, tab: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    monkeypatch.setattr(side_folder, "ONE_FILE_FEATURES", 96)
    alone = page_of(tmp_path / "run")
    word, features = rare_word(Contents.of(load_run(page.parent)))
    opened(tab, f"file://{alone}")
    found, said = search(tab, word)
    assert set(found) == features and "by their contexts" in said
    # Two words, whatever white space is between them.
    texts = around(Contents.of(load_run(page.parent)))
    line = next(line for text in texts.values() for line in text.split("\n") if word in line)
    at = line.index(word)
    phrase = line[at : line.find(" ", at + len(word) + 1)].strip()
    assert " " in phrase
    assert set(search(tab, phrase)[0]) == {i for i, text in texts.items() if phrase in text}
    assert tab.requests == [] and tab.messages == []


def around(contents: Contents) -> dict[int, str]:
    """By feature, the texts around its peaks, a line each."""
    analysis = contents.analysis
    assert analysis is not None
    tensors, tokens = analysis.top_contexts, analysis.top_tokens["tokens"]
    found: dict[int, str] = {}
    for i, own in enumerate(tensors["features"].tolist()):
        kept = zip(tensors["context"][i].tolist(), tensors["position"][i].tolist(), strict=True)
        rows = [tensors["ids"][c].tolist()[max(0, at - 24) : at + 25] for c, at in kept if c >= 0]
        texts = ["".join(tokens[str(t)] for t in row) for row in rows]
        found[own] = "\n".join(re.sub(r"\s+", " ", text) for text in texts).lower()
    return found


def rare_word(contents: Contents) -> tuple[str, set[int]]:
    """A word near some peaks, and the features of those; it names no feature and no cluster."""
    assert contents.analysis is not None
    specialization = contents.analysis.specialization
    named = [" ".join(row).lower() for row in specialization["features"]["top_tokens"]]
    named += [str(c["name"]).lower() for c in specialization["clusters"]]
    texts = around(contents)
    words = sorted({word for text in texts.values() for word in text.split() if word.isalpha()})
    for word in words:
        own = {i for i, text in texts.items() if re.search(rf"(?<![^\W_]){word}", text)}
        if len(word) > 2 and len(own) < 40 and not any(word in said for said in named):
            return word, own
    raise AssertionError("every word names something")


@pytest.mark.slow
def test_without_its_folder_the_page_says_what_is_missing(
    page: Path, tab: Page, tmp_path: Path
) -> None:
    shutil.copy(page, tmp_path / "alone.html")
    opened(tab, f"file://{tmp_path / 'alone.html'}#feature-3")
    tab.wait("document.querySelector('#feature-contexts .missing')")
    said = tab.run("document.querySelector('#feature-contexts').textContent")
    assert "0000.js is not beside this page" in said and "copied with it" in said
    tab.run("document.querySelector('#feature-close').click()")
    assert "words.js is not beside this page" in search(tab, "xyzzy")[1]
    assert search(tab, "id=17")[0] == [17]


@pytest.mark.slow
def test_no_token_of_a_part_is_run(evil_folder: Path, tab: Page, tmp_path: Path) -> None:
    shutil.copytree(evil_folder, tmp_path / "run")
    page = page_of(tmp_path / "run")
    opened(tab, f"file://{page}#feature-0")
    tab.wait(filled(0))
    assert tab.run("document.querySelectorAll('img').length") == 0
    assert EVIL in tab.run("document.body.textContent")
    assert tab.messages == []


def test_the_page_goes_to_wandb_with_its_folder_and_an_index_reads_neither(
    page: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(page.parent, folder)
    sent = [path for pattern in _REPORT_FILES for path in folder.glob(pattern)]
    assert {path.name for path in sent} >= {"report.html", "0000.js", "0004.js", "words.js"}
    for part in (folder / "report_features").rglob("*.js"):
        part.write_bytes(b"damaged")
    html = write_index(tmp_path).read_text(encoding="utf-8")
    assert 'href="run/report.html"' in html
    assert "report_features" not in html and "<script src" not in html


def test_an_old_page_keeps_its_parts_until_the_new_one_is_there(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(page.parent, folder)
    files = RunFiles(folder)
    before = beside(files.report)
    (files.report_features / "left.tmp").mkdir()  # of a writer that was killed
    tokens = read_json(files.analysis.top_tokens)
    tokens["tokens"] = {i: text.upper() for i, text in tokens["tokens"].items()}
    from tcsae.base.files import write_json
    from tcsae.report import run_page

    write_json(files.analysis.top_tokens, tokens)

    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(run_page, "write_page", full)
        page_of(folder)
    assert set(before) < set(beside(files.report))  # both: which page will stay is not known
    after = beside(page_of(folder))
    assert len(after) == len(before) and not set(after) & set(before)
    assert [path.name for path in files.report_features.iterdir()] == [Path(after[0]).parent.name]


def test_the_same_content_has_the_same_name_and_what_was_taken_is_put_back(
    page: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(page.parent, folder)
    before = beside(folder / "report.html")
    (folder / "report_features" / before[2]).unlink()
    assert beside(page_of(folder)) == before
    html = Tags((folder / "report.html").read_text(encoding="utf-8"))
    assert len(html.named("script")) == 3  # none of them is of the folder


def test_the_page_of_65536_features_keeps_its_limits_and_the_docs_say_what_was_measured() -> None:
    found = read_json(page_scale.RESULTS)
    (largest,) = [c for c in found["cases"] if (c["d_sae"], c["name"]) == (65_536, "now")]
    assert largest["listed"] == 65_536
    assert largest["first_row_seconds"] < 3 and largest["page_bytes"] < 15e6
    assert page_scale.text(found) in page_scale.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_with_its_features_repeated_has_a_page(run_folder: Path, tmp_path: Path) -> None:
    wide = page_scale.widened(load_run(run_folder), 250)
    html = write_run_page(wide, tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(beside(tmp_path / "report.html")) == 250 // PART + 1 + 1
    assert "SAE of 250 features" in html
