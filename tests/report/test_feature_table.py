"""What the page's script is given of the features is what the run's files say."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcsae.report import feature_table as module
from tcsae.report import neighbours
from tcsae.report.contents import Contents
from tcsae.report.feature_table import FeatureTable
from tcsae.runs.folder import load_run


def unpacked(code: dict[str, Any]) -> np.ndarray:
    """What page.js does."""
    data = np.frombuffer(base64.b64decode(code["data"]), dtype=np.uint8)
    if code["dtype"] == "float24":
        whole = np.pad(data.reshape(-1, 3), ((0, 0), (1, 0)))
        return whole.view("<f4").reshape(code["shape"])
    return data.view(np.dtype(code["dtype"])).reshape(code["shape"])


@pytest.fixture(scope="module")
def contents(run_folder: Path) -> Contents:
    return Contents.of(load_run(run_folder))


@pytest.fixture(scope="module")
def table(contents: Contents) -> FeatureTable:
    return FeatureTable(contents)


def texts(column: dict[str, Any]) -> list[list[str]]:
    """The lists that `tokens` of the index stands for."""
    stops = unpacked(column["count"]).cumsum()
    numbers = np.split(unpacked(column["at"]), stops[:-1])
    return [[column["vocabulary"][i] for i in row] for row in numbers]


def test_every_scalar_of_every_feature_is_in_the_index(table: FeatureTable) -> None:
    data, contents = table.index(), table.contents
    assert data["n"] == 96
    assert (unpacked(data["live"]) == contents.live).all()
    for name in ("rho_1", "density", "C_4", "omega_squared"):
        found = unpacked(data["values"][name])
        np.testing.assert_allclose(found, contents.values[name], rtol=2e-5)
    features = contents.analysis.specialization["features"]
    assert unpacked(data["cluster"]).tolist() == features["cluster"]
    assert texts(data["tokens"]) == features["top_tokens"]
    keys = {column["key"] for column in data["columns"]}
    assert keys == {"id", "tokens", "cluster", *data["values"]}


@pytest.mark.parametrize(("first", "stop"), [(0, 96), (32, 64), (90, 96)])
def test_curves_come_back_within_their_rounding(table: FeatureTable, first: int, stop: int) -> None:
    curves, own = table.part(first, stop)["curves"], slice(first, stop)
    rho = unpacked(curves["rho"]).astype(float)
    rho[rho == curves["rho"]["missing"]] = np.nan
    want = table.contents.values
    np.testing.assert_allclose(rho.T / 10000, want["rho"][:, own], atol=6e-5)
    rate = unpacked(curves["rate"]).T / 255 * np.array(curves["rate_scale"])
    np.testing.assert_allclose(rate, np.nan_to_num(want["profile_rate"][:, own]), atol=0.003)


@pytest.mark.parametrize(("first", "stop"), [(0, 96), (32, 64), (90, 96)])
def test_top_contexts_come_back_within_their_rounding(
    table: FeatureTable, first: int, stop: int
) -> None:
    top = table.part(first, stop)["top"]
    counts, at = unpacked(top["count"]), unpacked(top["at"])
    level, value = unpacked(top["level"]), unpacked(top["value"])
    tensors = {k: v[first:stop] for k, v in table.contents.analysis.top_contexts.items()}
    rows = tensors["rows"].float().numpy()
    found = np.zeros_like(rows)
    start = 0
    for s, k in np.ndindex(counts.shape):
        part = slice(start, start + counts[s, k])
        found[s, k, at[part]] = level[part] / 255 * value[s, 0]
        start += counts[s, k]
    assert start == len(at) == (rows > 0).sum()
    np.testing.assert_allclose(found, rows, atol=value.max() / 255)
    assert top["row"] == list(range(stop - first))
    numbers = table.contents.analysis.top_contexts["number"]
    context, known = unpacked(top["context"]), tensors["context"].numpy()
    assert ((context < 0) == (known < 0)).all()
    shown = np.array(top["numbers"])
    assert (shown[context[known >= 0]] == numbers.numpy()[known[known >= 0]]).all()
    tokens = table.contents.analysis.top_tokens["tokens"]
    ids = table.contents.analysis.top_contexts["ids"][int(known.max())].tolist()
    own = unpacked(top["ids"])[int(context.max())]
    assert [top["vocabulary"][i] for i in own] == [tokens[str(i)] for i in ids]


def test_a_feature_without_contexts_has_no_row(contents: Contents) -> None:
    analysis = contents.analysis
    of_feature = ("features", "context", "position", "value", "rows")
    kept = {n: v[1::2] if n in of_feature else v for n, v in analysis.top_contexts.items()}
    fewer = dataclasses.replace(analysis, top_contexts=kept)
    table = FeatureTable(dataclasses.replace(contents, analysis=fewer))
    assert table.part(10, 16)["top"]["row"] == [-1, 0, -1, 1, -1, 2]
    value = unpacked(table.part(10, 16)["top"]["value"])
    np.testing.assert_array_equal(value, analysis.top_contexts["value"][[11, 13, 15]])


def test_with_many_activations_fewer_contexts_are_shown(
    table: FeatureTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table.contents.analysis.top_contexts["rows"]
    monkeypatch.setattr(module, "MAX_ACTIVATIONS", int((rows[:, :2] > 0).sum()))
    assert unpacked(table.part(0, 96)["top"]["context"]).shape == (96, 2)


def test_words_are_the_texts_around_the_peaks(table: FeatureTable) -> None:
    words = table.words()
    found = unpacked(words["ids"])
    assert found.shape[::2] == (96, 2 * module.AROUND + 1)
    assert words["vocabulary"][0] == ""
    analysis = table.contents.analysis
    tensors, tokens = analysis.top_contexts, analysis.top_tokens["tokens"]
    some = 0
    for s, k in np.ndindex(found.shape[:2]):
        context, peak = int(tensors["context"][s, k]), int(tensors["position"][s, k])
        said = "".join(words["vocabulary"][i] for i in found[s, k])
        if context < 0:
            assert said == ""
            continue
        some += 1
        row = tensors["ids"][context].tolist()
        near = row[max(0, peak - module.AROUND) : peak + module.AROUND + 1]
        assert said == "".join(tokens[str(i)] for i in near)
    assert some > 96


def test_words_of_several_tokens_are_whole(contents: Contents) -> None:
    analysis = contents.analysis
    context, position = (int(analysis.top_contexts[n][0, 0]) for n in ("context", "position"))
    first, second = 90_001, 90_002
    ids = analysis.top_contexts["ids"].clone()
    at = min(position, ids.shape[1] - 2)
    ids[context, at], ids[context, at + 1] = first, second
    tokens = analysis.top_tokens | {
        "tokens": analysis.top_tokens["tokens"] | {str(first): "\\xc3", str(second): "\\xa9"},
        "parts": {str(first): "c3", str(second): "a9"},
    }
    changed = dataclasses.replace(
        analysis, top_contexts=analysis.top_contexts | {"ids": ids}, top_tokens=tokens
    )
    table = FeatureTable(dataclasses.replace(contents, analysis=changed))
    words = table.words()
    said = "".join(words["vocabulary"][i] for i in unpacked(words["ids"])[0, 0])
    assert "é" in said and "\\xc3" not in said
    joined = table.part(0, 1)["top"]["joined"]
    assert [at, at + 2, "é"] in [row[1:] for row in joined]


def test_what_fires_along_the_document_comes_by_part(table: FeatureTable) -> None:
    document = table.contents.analysis.document
    if not document:
        assert table.part(32, 64)["document"] is None
        return
    marks = table.part(32, 64)["document"]
    counts = torch.bincount(document["feature"].long(), minlength=96)[32:64]
    assert unpacked(marks["count"]).tolist() == counts.tolist()
    assert len(unpacked(marks["at"])) == counts.sum()


def test_the_nearest_is_found_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(W, dim=1)
    want_cosine, want = (unit @ unit.T).fill_diagonal_(-2).max(1)
    for at_once in (1, 23 * 4, 10**6):
        monkeypatch.setattr(neighbours, "AT_ONCE", at_once)
        number, cosine = neighbours.nearest(W)
        assert number.tolist() == want.tolist()
        np.testing.assert_allclose(cosine, want_cosine, rtol=1e-5)
    some, cosine = neighbours.nearest(W, torch.tensor([3, 20]))
    assert some[[3, 20]].tolist() == want[[3, 20]].tolist() and (np.delete(some, [3, 20]) < 0).all()
    assert np.isfinite(cosine).sum() == 2
    alone, none = neighbours.nearest(W[:1])
    assert alone.tolist() == [-1] and np.isnan(none).all()
