"""The plots: where the marks are, and what does not break them."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from gpa_conformance.report import plots
from gpa_conformance.report.svg import Axis, Chart
from gpa_conformance.results import CaseResult, RunReport, make_check
from tests.conformance.sample_reports import sample_report

KINDS = (plots.errors_by_position, plots.kl_histogram, plots.margin_against_regret, plots.limits_used)


def marks(svg: str, css: str) -> list[ElementTree.Element]:
    """Elements of one class."""
    return [each for each in ElementTree.fromstring(svg).iter() if css in each.get("class", "").split()]


def with_series(**series: list[float]) -> RunReport:
    case = CaseResult("logits/x", "logits", "a case", "passed", series=series)
    return replace(sample_report(), cases=(case,))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("fault", [False, True])
def test_plots_are_well_formed_and_told_in_words(kind, fault: bool) -> None:
    plot = kind(sample_report(fault=fault))
    assert plot is not None
    root = ElementTree.fromstring(plot.svg)
    assert root.get("role") == "img"
    words = {each.get("id"): each.text for each in root}
    title, description = (words[name] for name in root.get("aria-labelledby", "").split())
    assert title == plot.title
    assert description
    assert not {"nan", "inf"} & {word.lower() for each in root.iter() for word in each.attrib.values()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_run_without_data_has_no_plot(kind) -> None:
    assert kind(replace(sample_report(), cases=())) is None


def test_histogram_counts_every_position_once() -> None:
    plot = plots.kl_histogram(with_series(kl=[0.0, 1e-30, 2e-5, 2.1e-5, 0.5, 1e9, math.nan]))
    assert plot is not None
    titles = [each[0].text or "" for each in marks(plot.svg, "bar")]
    assert sum(int(title.split()[0]) for title in titles) == 6
    assert "1 position with NaN" in plot.caption


def test_agreeing_positions_are_ticks_and_the_others_dots() -> None:
    plot = plots.margin_against_regret(
        with_series(rel_l2=[0.1] * 4, margin=[1.0, 0.5, 0.01, 2.0], regret=[0.0, 0.0, 0.01, math.nan])
    )
    assert plot is not None
    assert len(marks(plot.svg, "dot")) == 1
    assert marks(plot.svg, "rug")[0].get("d", "").count("M") == 2
    assert "2 of 3 positions agree, 1 differ" in plot.caption


def test_nan_is_drawn_as_a_dot_at_the_upper_edge() -> None:
    plot = plots.errors_by_position(with_series(rel_l2=[0.01, math.nan, 0.02, 0.03]))
    assert plot is not None
    assert len(marks(plot.svg, "bad")) == 1
    assert "NaN or infinite" in plot.caption


def test_one_prompt_of_one_position_is_drawn() -> None:
    plot = plots.errors_by_position(with_series(position=[0.0], rel_l2=[0.0]))
    assert plot is not None
    assert len(marks(plot.svg, "dot")) == 1


def test_draws_of_sampling_are_bars() -> None:
    case = CaseResult("sampling/x", "sampling", "draws", "passed", series={"draws_by_rank": [5.0, 7.0, 6.0]})
    plot = plots.case_plot(case, "name")
    assert plot is not None
    assert len(marks(plot.svg, "bar")) == 3


@pytest.mark.parametrize(
    "series",
    [{"prefix": [1.0, 16.0, 40.0], "prefix_rel_l2": [0.0, 1e-7, math.nan]}, {"decode_regret": [0.0, 0.5, math.inf]}],
    ids=["prefixes", "decoding"],
)
def test_plots_of_the_cache_have_a_dot_per_value(series: dict[str, list[float]]) -> None:
    case = CaseResult("cache/x", "cache", "a case", "passed", series=series)
    plot = plots.case_plot(case, "name")
    assert plot is not None
    assert len(marks(plot.svg, "dot")) == 3
    assert len(marks(plot.svg, "bad")) == 1
    assert "1 not finite" in plot.caption


def test_the_share_of_limits_has_a_dot_per_check_in_the_row_of_its_metric() -> None:
    checks = tuple(make_check("rel_l2", value, "<=", 0.03, "here") for value in (0.01, 0.06))
    case = CaseResult("logits/x", "logits", "a case", "failed", checks=checks)
    plot = plots.limits_used(replace(sample_report(), cases=(case,)))
    assert plot is not None
    assert len(marks(plot.svg, "dot")) == 2
    assert len(marks(plot.svg, "bad")) == 1
    assert ">rel_l2<" in plot.svg


def test_text_in_a_chart_is_text() -> None:
    chart = Chart("<b>", "&", Axis("<x>", 0, 1), Axis("y", 0, 1))
    chart.point(0.5, 0.5, "", "<script>")
    root = ElementTree.fromstring(chart.render("it"))
    assert root.find("b") is None
    assert marks(chart.render("it"), "dot")[0][0].text == "<script>"


@pytest.mark.parametrize(
    ("axis", "value", "fraction"),
    [
        (Axis("x", 0, 10), 5, 0.5),
        (Axis("x", 0, 10), 20, 1),
        (Axis("x", 0.01, 1, log=True), 0.1, 0.5),
        (Axis("x", 0.01, 1, log=True), 0, 0),
    ],
)
def test_axes_place_values(axis: Axis, value: float, fraction: float) -> None:
    assert axis.fraction(value) == pytest.approx(fraction)


def test_axes_cover_their_values_in_whole_decades() -> None:
    axis = Axis.decades("x", [3e-5, 0.2, math.nan], 1e-9, 1e3)
    assert (axis.low, axis.high) == pytest.approx((1e-5, 1))
    assert [label for _, label in Axis("x", 0, 180).ticks()] == ["0", "50", "100", "150"]
