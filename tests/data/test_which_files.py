"""Which files of a folder are its text, and what is said of the others."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tcsae.base.errors import UserError
from tcsae.config.compose import config_of
from tcsae.data.corpora import FilesCorpus


def rows(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(texts)}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts_of(folder: Path, split: str = "train") -> list[str]:
    return [d.text for d in FilesCorpus.from_path(folder, "text", split).documents()]


def test_a_dataset_card_beside_rows_is_no_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows(tmp_path / "data" / "part-0.parquet", "one", "two")
    for name in ("README.md", "LICENSE.txt", "sub/CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Who made it, and how to cite it.")
    (tmp_path / "story.txt").write_text("three")
    assert texts_of(tmp_path) == ["one", "two", "three"]
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "not taken for data: LICENSE.txt, README.md, sub/CHANGELOG.md" in said


def test_a_readme_alone_is_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("only this")
    assert texts_of(tmp_path) == ["only this"]


def test_files_named_by_split_are_read_by_split(tmp_path: Path) -> None:
    rows(tmp_path / "train-00000-of-00001.parquet", "a", "b")
    rows(tmp_path / "test.jsonl", "c")
    rows(tmp_path / "dev" / "0.jsonl", "d")
    assert texts_of(tmp_path) == ["a", "b"]
    assert texts_of(tmp_path, "test") == ["c"]
    assert texts_of(tmp_path, "validation") == ["d"]
    with pytest.raises(
        UserError, match="no split nosuch: set dataset.split to one of test, train, val"
    ):
        texts_of(tmp_path, "nosuch")


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    rows(tmp_path / "all.jsonl", "a")
    with pytest.raises(UserError, match=r"dataset.split=test: .*all.jsonl is one file"):
        texts_of(tmp_path / "all.jsonl", "test")
    with pytest.raises(UserError, match=r"dataset.split=test: .* has no splits"):
        texts_of(tmp_path, "test")


def test_text_files_have_splits_too(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts_of(tmp_path) == ["train"] and texts_of(tmp_path, "test") == ["test"]


def test_names_by_chance_are_no_splits(tmp_path: Path) -> None:
    rows(tmp_path / "a" / "wiki.jsonl", "1")
    rows(tmp_path / "a" / "contest-eval.jsonl", "2")
    rows(tmp_path / "a" / "dev-notes.jsonl", "3")
    assert sorted(texts_of(tmp_path / "a")) == ["1", "2", "3"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.txt").write_text("of a train")
    (tmp_path / "b" / "boat.txt").write_text("of a boat")
    assert len(texts_of(tmp_path / "b")) == 2


def test_a_file_is_in_one_split_and_what_is_in_none_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows(tmp_path / "train" / "test-1.jsonl", "a")
    rows(tmp_path / "test" / "0.jsonl", "b")
    rows(tmp_path / "extra.jsonl", "c")
    assert texts_of(tmp_path) == ["a"] and texts_of(tmp_path, "test") == ["b"]
    assert "not taken for data: extra.jsonl" in caplog.text


def test_what_a_saved_dataset_does_not_name_is_left_out(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["kept"]}).save_to_disk(str(tmp_path / "d"))
    Dataset.from_dict({"text": ["left over"]}).save_to_disk(str(tmp_path / "e"))
    (left,) = (tmp_path / "e").glob("*.arrow")
    left.rename(tmp_path / "d" / "data-00007-of-00008.arrow")
    assert texts_of(tmp_path / "d") == ["kept"]


@pytest.mark.parametrize("text", ["no json", "{}", "[]", '{"splits": null}', "\udcff"])
def test_a_broken_list_of_splits_is_one_line(tmp_path: Path, text: str) -> None:
    rows(tmp_path / "a.jsonl", "a")
    (tmp_path / "dataset_dict.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="dataset_dict.json") as raised:
        texts_of(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("dataset", "key"),
    [("files", "revision"), ("shakespeare", "revision")],
)
def test_a_key_of_the_hub_is_refused_for_other_text(dataset: str, key: str) -> None:
    with pytest.raises(UserError, match=f"{key} is for datasets of the hub"):
        config_of(f"dataset={dataset}", "dataset.path=x", f"dataset.{key}=main")
    assert getattr(config_of("dataset=pile", f"dataset.{key}=main").dataset, key) == "main"


# ---------------------------------------------------------------- the dataset card

CARD = """---
license: mit
configs:
- config_name: stories
  data_files:
  - split: train
    path: stories/part-*.jsonl
  - split: test
    path: [stories/held.jsonl]
- config_name: letters
  data_dir: letters
- config_name: all
  default: true
  data_files: ["stories/*.jsonl", "letters/**/*.jsonl"]
---
# A card
"""


@pytest.fixture
def with_card(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(CARD)
    rows(tmp_path / "stories" / "part-0.jsonl", "a")
    rows(tmp_path / "stories" / "part-1.jsonl", "b")
    rows(tmp_path / "stories" / "held.jsonl", "c")
    rows(tmp_path / "letters" / "x" / "1.jsonl", "d")
    rows(tmp_path / "draft.jsonl", "e")
    return tmp_path


@pytest.mark.parametrize(
    ("subset", "split"),
    [("stories", "train"), ("stories", "test"), ("letters", "train"), (None, "train")],
)
def test_a_card_says_which_files_are_which(with_card: Path, subset: str | None, split: str) -> None:
    import datasets

    corpus = FilesCorpus.from_path(with_card, "text", split, subset=subset)
    cache = str(with_card.parent / "cache")
    wanted = datasets.load_dataset(str(with_card), name=subset, split=split, cache_dir=cache)
    texts = [d.text for d in corpus.documents()]
    assert sorted(texts) == sorted(wanted["text"]) and "e" not in texts


def test_what_a_card_does_not_have_is_refused_with_what_it_has(with_card: Path) -> None:
    with pytest.raises(UserError, match="no subset x: set dataset.subset to one of stories, let"):
        FilesCorpus.from_path(with_card, "text", "train", subset="x")
    with pytest.raises(UserError, match="no split test: set dataset.split to one of train"):
        FilesCorpus.from_path(with_card, "text", "test")
    card = with_card / "README.md"
    card.write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(UserError, match="several subsets: set dataset.subset to one of stories"):
        FilesCorpus.from_path(with_card, "text", "train")
    card.write_text(CARD.replace("stories/part-*", "stories/gone-*"))
    with pytest.raises(UserError, match="gone-.*fetch what is missing"):
        FilesCorpus.from_path(with_card, "text", "train", subset="stories")
    card.write_text("---\nconfigs: [}\n---\n")
    with pytest.raises(UserError, match="header is not YAML") as raised:
        FilesCorpus.from_path(with_card, "text", "train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("pattern", ["../out/*.jsonl", "/etc/*.jsonl", "stories/../../out/*.jsonl"])
def test_a_card_names_nothing_outside_its_folder(with_card: Path, pattern: str) -> None:
    rows(with_card.parent / "out" / "secret.jsonl", "s")
    (with_card / "README.md").write_text(CARD.replace("stories/part-*.jsonl", pattern))
    with pytest.raises(UserError, match="fetch what is missing"):
        FilesCorpus.from_path(with_card, "text", "train", subset="stories")


def test_a_subset_of_what_has_none_is_refused(tmp_path: Path) -> None:
    rows(tmp_path / "a.jsonl", "a")
    for path in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(UserError, match="dataset.subset=x.*has no subsets"):
            FilesCorpus.from_path(path, "text", "train", subset="x")


def test_a_pointer_of_git_lfs_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a story")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    (tmp_path / "b.txt").write_text(pointer)
    with pytest.raises(UserError, match="b.txt is a pointer of git-lfs.*git lfs pull"):
        texts_of(tmp_path)


def test_a_row_nested_too_deep_is_one_line(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y", "tree": ' + deep + "}\n")
    with pytest.raises(UserError, match="a.jsonl line 2 is nested too deep"):
        texts_of(tmp_path)


@pytest.mark.parametrize("key", ["project", "entity"])
@pytest.mark.parametrize("name", ["me/sae", "a#b", "what?", "50%", "a:b"])
def test_a_name_that_wandb_refuses_is_refused_first(key: str, name: str) -> None:
    with pytest.raises(UserError, match=f"tracking.{key} = .*W&B takes no"):
        config_of(f"tracking.{key}='{name}'")
