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


@pytest.mark.parametrize("key", ["subset", "revision"])
def test_a_key_of_the_hub_is_refused_for_files(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} is for datasets of the hub"):
        config_of("dataset=files", "dataset.path=x", f"dataset.{key}=main")
    assert getattr(config_of("dataset=pile", f"dataset.{key}=main").dataset, key) == "main"


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
