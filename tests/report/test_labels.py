"""Numbers are written so that people read the right thing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcsae.base.labels import decimals, difference_text, interval_text, label, listed, number


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "n/a"),
        (float("nan"), "n/a"),
        (0.0, "0.000"),
        (0.7915, "0.791"),
        (-0.2, "-0.200"),
        (32.0, "32"),
        (12.4529, "12.45"),
        (345.678, "345.7"),
        (123456.7, "123,457"),
        (0.00012345, "0.00012"),
    ],
)
def test_number_keeps_what_matters(value: float | None, written: str) -> None:
    assert number(value) == written


def test_an_interval_without_an_end_is_not_written() -> None:
    assert interval_text((0.1, 0.25)) == "[0.100, 0.250]"
    assert interval_text((None, 0.25)) == interval_text(None) == ""


def test_any_window_and_any_unknown_metric_has_a_name() -> None:
    assert label("C_24").name == "Window consistency C_24"
    assert "24 tokens" in label("C_24").meaning
    assert label("something_new") == ("something_new", "")


def test_a_difference_has_the_decimals_its_interval_is_worth() -> None:
    assert difference_text(-0.0101, -0.01118, -0.00952) == "-0.0101 [-0.0112, -0.0095]"
    assert difference_text(0.5, 0.4, 0.62) == "+0.500 [0.400, 0.620]"
    assert difference_text(0.0003, None, None) == "+0.0003"
    assert difference_text(None, None, None) == "n/a"


@given(
    low=st.floats(1e-6, 10, allow_subnormal=False), width=st.floats(1e-6, 10, allow_subnormal=False)
)
def test_an_interval_that_ends_beside_zero_is_not_written_as_touching_it(
    low: float, width: float
) -> None:
    digits = decimals(low, low + width)
    assert float(f"{low:.{digits}f}") > 0
    assert decimals(-low - width, -low) == digits


def test_a_list_reads_as_one() -> None:
    assert [listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
