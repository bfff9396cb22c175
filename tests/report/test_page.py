"""The shell: self-contained, and deaf to what texts contain."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from browser import EVIL

from tcsae.base.json_numbers import plain
from tcsae.report.page import packed, script_json


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "float32"])
def test_a_packed_array_comes_back(dtype: str) -> None:
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    code = packed(values)
    back = np.frombuffer(base64.b64decode(code["data"]), dtype=np.dtype(code["dtype"]))
    assert (back.reshape(code["shape"]) == values).all()


def test_what_json_cannot_hold_becomes_null() -> None:
    tree = {"a": [float("nan"), np.float32(1.5)], 3: np.array([np.inf, 2.0]), "b": (True, None)}
    assert plain(tree) == {"a": [None, 1.5], "3": [None, 2.0], "b": [True, None]}


def test_numbers_keep_four_digits() -> None:
    given = [1.23456, float("nan"), None, 1234567.0, 12345]
    assert plain(given, 4) == [1.235, None, None, 1235000.0, 12345]
    assert plain(torch.tensor([0.1, torch.nan], dtype=torch.float32), 6) == [0.1, None]
    assert plain(torch.tensor([True, False])) == [True, False]


def test_data_cannot_end_its_script_element() -> None:
    written = script_json({"text": EVIL})
    assert "<" not in written
    assert json.loads(written) == {"text": EVIL}
