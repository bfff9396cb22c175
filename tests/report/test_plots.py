"""Figures carry the numbers they were given."""

from __future__ import annotations

import numpy as np
import pytest

from tcsae.report import plots
from tcsae.report.plots import Curve, Point


def test_a_band_covers_the_lags_that_have_an_interval() -> None:
    curve = Curve("a", [1, 2, 3], [0.5, 0.4, None], [0.4, 0.3, None], [0.6, 0.5, None])
    band, line = plots.lines([curve], "x", "y").data
    assert band.x == (1, 2, 2, 1)
    assert band.y == (0.6, 0.5, 0.3, 0.4)
    assert line.y == (0.5, 0.4, None)


def test_autocorrelation_leaves_out_lag_0() -> None:
    figure = plots.autocorrelation([Curve("a", [0, 1, 2], [1.0, 0.5, 0.2])])
    assert figure.data[0].x == (1, 2)
    assert figure.data[0].y == (0.5, 0.2)


def test_a_histogram_counts_every_value_once() -> None:
    values = np.append(np.random.default_rng(0).normal(size=500), [np.nan, 1e6])
    figure = plots.histogram(values, "x", {"median": 0.0, "absent": None})
    assert figure.data[0].y.sum() == 501
    assert [trace.name for trace in figure.data[1:]] == ["median"]
    constant = plots.histogram(np.full(7, 2.0), "x", {})
    assert constant.data[0].y.sum() == 7
    assert not plots.histogram(np.full(3, np.nan), "x", {}).data


def test_the_first_35_lines_look_different() -> None:
    assert len({plots.style(i) for i in range(35)}) == 35


def test_names_are_shown_as_they_are() -> None:
    figure = plots.lines([Curve("<b>a</b>", [1], [1.0])], "x", "y")
    assert figure.data[0].name == "&lt;b&gt;a&lt;/b&gt;"
    hover = plots.cluster_map(
        np.zeros((1, 2)), np.array([0]), ["<i>"], np.array([3]), [["<a href=x>", "second"]]
    )
    assert hover.data[0].text == ("&lt;a href=x&gt;<br>second",)


def test_a_feature_that_fires_alike_everywhere_has_a_flat_profile() -> None:
    rate_TF = np.full((6, 3), 0.2) * [1, 2, 3]
    rate_TF[0] = np.nan
    rate_TF[3, 2] = 0.0
    (flat, bound) = plots.profiles(rate_TF, {"flat": np.array([0, 1]), "bound": np.array([2])})
    assert flat.x == [1, 2, 3, 4, 5]
    assert flat.y == pytest.approx([1] * 5)
    assert bound.y == pytest.approx([1.25, 1.25, 0, 1.25, 1.25])


def test_the_correlation_map_scales_by_what_is_off_the_diagonal() -> None:
    r = np.array([[1.0, 0.1, -0.3], [0.1, 1.0, np.nan], [-0.3, np.nan, 1.0]])
    figure = plots.correlation_map(r, ["0", "1", "2"], [1])
    assert figure.data[0].zmax == pytest.approx(0.3, abs=0.01)
    assert figure.data[0].zmin == -figure.data[0].zmax
    assert [shape.x0 for shape in figure.layout.shapes] == [0.5, -0.5]


def test_a_cluster_map_keeps_each_feature_with_its_cluster() -> None:
    labels = np.array([1, 0, -1, 0])
    points, features = np.arange(8.0).reshape(4, 2), np.array([5, 6, 7, 8])
    figure = plots.cluster_map(points, labels, ["a", "b"], features, [["x"]] * 4)
    found = {trace.name: trace.customdata.tolist() for trace in figure.data}
    assert found == {"no cluster": [7], "a": [6, 8], "b": [5]}
    looks = {(trace.marker.color, trace.marker.symbol) for trace in figure.data}
    assert len(looks) == 3


def test_points_have_error_bars_where_there_is_an_interval() -> None:
    with_bar = Point("a", 1.0, 0.5, y_interval=(0.4, 0.7), colour=0.1, group="arm")
    without = Point("b", 2.0, 0.6, y_interval=(None, None), colour=0.2, group="arm")
    figure = plots.plane([with_bar, without], "x", "y", colour_title="c", joined=True)
    line, first, second = figure.data
    assert list(line.x) == [1.0, 2.0]
    assert first.error_y.array[0] == pytest.approx(0.2)
    assert first.error_y.arrayminus[0] == pytest.approx(0.1)
    assert second.error_y.array is None
    assert figure.layout.coloraxis.cmin == 0.1


def test_a_forest_tells_noise_from_a_clear_difference_and_shows_zero() -> None:
    rows = [Point("noise", 0.1, 0, (-0.1, 0.3)), Point("clear", 0.4, 0, (0.2, 0.6))]
    figure = plots.forest(rows, "difference")
    assert [trace.marker.symbol for trace in figure.data] == ["circle-open", "circle"]
    low, high = figure.layout.xaxis.range
    assert low < -0.1 and high > 0.6
