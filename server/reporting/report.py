"""A run's report: one HTML file that loads nothing else.

It is made from the run's result alone, which is also saved as ``metrics.json``, so that it can be made again.
A part that the result lacks is left out, and an undefined metric is never shown as a number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from common.config.parse import parse_config
from common.config.schema import Config
from common.utils.atomic_files import atomic_write
from server.reporting.centre_tables import (
    build_centre_table,
    build_drift_table,
    build_label_count_tables,
)
from server.reporting.cross_site_figures import build_cross_site_figures
from server.reporting.figures import (
    build_cost_figures,
    build_image_statistics_figures,
    build_round_figures,
    build_score_figures,
    build_weight_figures,
)
from server.reporting.labels import count_noun, format_duration
from server.reporting.numbered_rounds import Rounds, list_rounds, select_indices
from server.reporting.plot_traces import NUM_COLOURS, Figure, select_dash
from server.reporting.report_tables import (
    ReportTable,
    build_cost_table,
    build_exclusion_table,
    build_privacy_table,
    build_score_table,
    build_stage_table,
    build_weight_table,
)
from server.reporting.report_template import REPORT_TEMPLATE
from server.reporting.result_summary import (
    HeadlineNumber,
    build_headline,
    describe_headline,
    get_label_counts,
    get_selection_metric,
    list_centre_names,
    primary_task_metric,
)
from server.reporting.scores import TaskMetric, list_metrics
from server.run.records import RunResult

MAX_FIGURE_POINTS = 10_000  # of all lines of a figure: a browser still draws them at once
MIN_CURVE_POINTS = 100  # of one line
BORDER_STYLES = {"solid": "solid", "dash": "dashed", "dot": "dotted", "dashdot": "double"}  # CSS, by Plotly's


@dataclass(frozen=True)
class LegendEntry:
    """A centre's button in the legend."""

    name: str
    colour: int
    border_style: str


@dataclass
class ReportFigures:
    """The report's figures by section."""

    scores: list[Figure] = field(default_factory=list)
    rounds: list[Figure] = field(default_factory=list)
    weights: list[Figure] = field(default_factory=list)
    costs: list[Figure] = field(default_factory=list)
    cross_site: list[Figure] = field(default_factory=list)
    image_statistics: list[Figure] = field(default_factory=list)

    def list_all(self) -> list[Figure]:
        """Return the figures of all sections."""
        return list(itertools.chain.from_iterable(vars(self).values()))


@dataclass(frozen=True)
class ReportTables:
    """The report's tables by section."""

    scores: list[ReportTable]
    stages: ReportTable
    weights: ReportTable
    label_counts: list[ReportTable]
    centres: ReportTable
    drift: ReportTable
    costs: ReportTable
    privacy: ReportTable
    exclusions: ReportTable


@dataclass(frozen=True)
class ReportPage:
    """Everything that the report shows."""

    title: str
    heading: str
    status: str
    facts: list[str]
    notes: list[str]
    headline: list[HeadlineNumber]
    headline_note: str
    legend: list[LegendEntry]
    figures: ReportFigures
    sampling_note: str  # which rounds the curves show, if not all
    tables: ReportTables
    config: str  # YAML


def write_report(path: Path, result: RunResult) -> None:
    """Write a run's report to a file; a failure leaves no partial file."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    page = build_page(result)
    text = environment.from_string(REPORT_TEMPLATE).render(
        page=page,
        figures=page.figures,
        tables=page.tables,
        figure_data=serialise_figures(page.figures.list_all()),
        plotly=Markup(get_plotlyjs()),
    )
    atomic_write(path, text.encode())


def serialise_figures(figures: Sequence[Figure]) -> Markup:
    """Write {id: {data, layout}} as JSON for a script element, which no name in it can end."""
    data = {figure.id: {"data": figure.data, "layout": figure.layout} for figure in figures}
    return Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def build_page(result: RunResult) -> ReportPage:
    """Gather everything that the report shows."""
    config = parse_config(result.config)
    rounds = list_rounds(result)
    centre_names = list_centre_names(result)
    shown = primary_task_metric(result)
    curve_rounds, step = downsample_rounds(rounds, len(centre_names))
    figures = _build_figures(result, curve_rounds, centre_names, shown)
    drawn = figures.list_all()
    for index, figure in enumerate(drawn):
        figure.id = f"figure{index}"
    sampling_note = ""
    if step > 1:
        sampling_note = (
            f"Of {len(rounds)} rounds the curves show every {step}th, and the first and last of each stage."
        )
    headline = build_headline(result, shown)
    headline_note = describe_headline(result, shown)
    return ReportPage(
        title=f"{result.recipe} · {result.run_id}",
        heading=f"{result.recipe}, {result.mode}",
        status=result.status,
        facts=_list_facts(result, rounds),
        notes=result.notes,
        headline=headline,
        headline_note=headline_note,
        legend=_build_legend(centre_names) if drawn else [],
        figures=figures,
        sampling_note=sampling_note,
        tables=_build_tables(result, config, rounds, centre_names, shown),
        config=yaml.safe_dump(result.config, sort_keys=False, allow_unicode=True, width=120),
    )


def _build_figures(
    result: RunResult, rounds: Rounds, centre_names: Sequence[str], shown: TaskMetric
) -> ReportFigures:
    figures = ReportFigures(
        rounds=build_round_figures(rounds, centre_names, shown.task, shown.metric),
        weights=build_weight_figures(rounds, centre_names),
        costs=build_cost_figures(rounds, centre_names),
        cross_site=build_cross_site_figures(result.cross_site, centre_names, shown.task, shown.metric),
        image_statistics=build_image_statistics_figures(result.image_statistics, centre_names),
    )
    for task in _order_tasks(result, shown.task):
        scores = result.test[task]
        if "auc" in scores.pooled and scores.sums:  # a binary task: its sums are histograms of scores
            figures.scores += build_score_figures(task, scores.sums, centre_names)
    return figures


def _build_tables(
    result: RunResult, config: Config, rounds: Rounds, centre_names: Sequence[str], shown: TaskMetric
) -> ReportTables:
    score_tables = []
    for task in _order_tasks(result, shown.task):
        scores = result.test[task]
        score_tables.append(build_score_table(task, scores, list_metrics(scores)))
    return ReportTables(
        scores=score_tables,
        stages=build_stage_table(result, get_selection_metric(result)),
        weights=build_weight_table(rounds, centre_names),
        label_counts=build_label_count_tables(get_label_counts(result)),
        centres=build_centre_table(result.centres),
        drift=build_drift_table(result.image_statistics),
        costs=build_cost_table(rounds),
        privacy=build_privacy_table(rounds, config.privacy),
        exclusions=build_exclusion_table(result),
    )


def _order_tasks(result: RunResult, first: str) -> list[str]:
    """Return the tested tasks, the main one first."""
    return sorted(result.test, key=lambda task: task != first)


def _list_facts(result: RunResult, rounds: Rounds) -> list[str]:
    num_rounds = sum(entry.round > 0 for entry in rounds)
    facts = [
        f"run {result.run_id}",
        result.mode,
        count_noun(len(result.centres), "centre"),
        count_noun(num_rounds, "round"),
        f"seed {result.seed}",
    ]
    if result.started:
        facts.append(f"started {result.started}")
    if result.seconds:
        facts.append(f"took {format_duration(result.seconds)}")
    return facts


def _build_legend(centre_names: Sequence[str]) -> list[LegendEntry]:
    legend = []
    for index, name in enumerate(centre_names):
        legend.append(LegendEntry(name, index % NUM_COLOURS, BORDER_STYLES[select_dash(index)]))
    return legend


def downsample_rounds(rounds: Rounds, num_centres: int) -> tuple[Rounds, int]:
    """Choose the rounds that curves show: every `step`th, and the first and the last of each stage.

    A figure gets about `MAX_FIGURE_POINTS`, but each line at least `MIN_CURVE_POINTS`.

    Returns:
        The chosen rounds and the step.
    """
    points_per_curve = max(MIN_CURVE_POINTS, MAX_FIGURE_POINTS // max(1, num_centres))
    step = max(1, len(rounds) // points_per_curve)
    indices = select_indices([entry.stage for entry in rounds], step)
    return [rounds[index] for index in indices], step
