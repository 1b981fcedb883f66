"""The report's figures as data for Plotly: scores, rounds, weights, costs and image statistics."""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.learning.metrics import compute_calibration_curve, compute_roc_curve, primary_metric
from server.reporting.labels import VIEW_LABELS, View, label_metric, to_finite_float
from server.reporting.numbered_rounds import Rounds
from server.reporting.plot_traces import (
    LEGEND_LAYOUT,
    SUMMARY_STYLE,
    Figure,
    LineStyle,
    Trace,
    Values,
    assign_styles,
    label_positions,
    list_numbers,
    make_line_trace,
    plot_over_rounds,
)
from server.run.records import CentreRound, ImageStatistic, RoundRecord, TaskScores

CHANCE_LINE: Trace = {
    "x": [0, 1],
    "y": [0, 1],
    "mode": "lines",
    "line": {"color": "var(--line)", "width": 1},
    "hoverinfo": "skip",
}
POOLED = VIEW_LABELS[View.POOLED]
UNIT_AXIS = {"range": [-0.02, 1.02], "dtick": 0.2}


def build_score_figures(
    task: str, histograms: Mapping[str, Sequence[Sequence[float]]], centre_names: Sequence[str]
) -> list[Figure]:
    """Plot ROC and calibration curves of a binary task, by centre and pooled.

    `histograms`: {centre: counts of scans by true class and score bin [2, bins]}.
    """
    arrays = {centre: np.asarray(histogram, float) for centre, histogram in histograms.items()}
    styles = assign_styles(centre_names)
    roc_traces = [CHANCE_LINE]
    calibration_traces = [CHANCE_LINE]
    for name, histogram in (*arrays.items(), (POOLED, np.sum(list(arrays.values()), axis=0))):
        style = styles[name] if name in arrays else SUMMARY_STYLE
        negatives, positives = histogram.sum(1)
        if negatives and positives:
            roc_traces.append(_roc_trace(name, style, histogram))
        if negatives or positives:
            calibration_traces.append(_calibration_trace(name, style, histogram))
    return [
        Figure(
            f"{task}: ROC on the test scans; pooled bold",
            roc_traces,
            _unit_square("1 − specificity", "sensitivity"),
            task,
        ),
        Figure(
            f"{task}: calibration on the test scans; pooled bold",
            calibration_traces,
            _unit_square("mean predicted probability", "observed share of positives"),
            task,
        ),
    ]


def _roc_trace(name: str, style: LineStyle, histogram: NDArray[np.float64]) -> Trace:
    fpr, tpr = compute_roc_curve(histogram)
    hover = f"{html.escape(name)}<br>1 − specificity %{{x:.3f}}<br>sensitivity %{{y:.3f}}<extra></extra>"
    return make_line_trace(name, style, fpr, tpr, hover, with_markers=False)


def _calibration_trace(name: str, style: LineStyle, histogram: NDArray[np.float64]) -> Trace:
    """Draw a mark for each group of predictions; its area grows with the number of scans."""
    predicted, observed, scans = compute_calibration_curve(histogram)
    values = "predicted %{x:.3f}<br>observed %{y:.3f}<br>%{customdata} scans"
    trace = make_line_trace(
        name, style, predicted, observed, f"{html.escape(name)}<br>{values}<extra></extra>"
    )
    trace["marker"]["size"] = (4 + 10 * np.sqrt(scans / scans.max())).round(1).tolist()
    trace["marker"]["opacity"] = 0.8
    return {**trace, "cliponaxis": False, "customdata": scans.astype(int).tolist()}


def _unit_square(x_label: str, y_label: str) -> dict[str, Any]:
    return {
        "xaxis": {**UNIT_AXIS, "title": {"text": x_label}},
        "yaxis": {**UNIT_AXIS, "title": {"text": y_label}},
    }


def build_round_figures(
    rounds: Rounds, centre_names: Sequence[str], primary_task: str, metric: str
) -> list[Figure]:
    """Plot each task's validation by centre, the primary task first, and the training loss.

    A task that lacks `metric` is shown by its own primary metric.
    """
    tasks: dict[str, None] = {}
    for entry in rounds:
        tasks |= dict.fromkeys(entry.record.validation)
    figures = []
    for task in sorted(tasks, key=lambda name: name != primary_task):
        figures.append(_validation_figure(rounds, centre_names, task, metric))
    losses = _centre_lines(rounds, centre_names, lambda reply: reply.loss)
    figures.append(plot_over_rounds("Training loss", "loss", rounds, centre_names, losses))
    return drop_empty(figures)


def drop_empty(figures: Iterable[Figure]) -> list[Figure]:
    """Return the figures that have something to draw."""
    return [figure for figure in figures if figure.data]


def _validation_figure(rounds: Rounds, centre_names: Sequence[str], task: str, metric: str) -> Figure:
    shown = primary_metric(metric, _defined_metrics(rounds, task))
    nothing = TaskScores(centres={}, macro={}, pooled={}, worst={}, spread={})
    scores = [entry.record.validation.get(task, nothing) for entry in rounds]
    lines = {}
    for name in centre_names:
        lines[name] = [_centre_value(round_scores, name, shown) for round_scores in scores]
    means = [to_finite_float(round_scores.macro.get(shown)) for round_scores in scores]
    label = label_metric(shown)
    mean_label = VIEW_LABELS[View.MACRO]
    title = f"{task}: {label} on validation; {mean_label} bold"
    figure = plot_over_rounds(title, label, rounds, centre_names, lines, {mean_label: means})
    figure.task = task
    figure.metric = shown
    return figure


def _defined_metrics(rounds: Rounds, task: str) -> set[str]:
    """Return the metrics whose mean over centres is defined in at least one round."""
    defined = set()
    for entry in rounds:
        if task in entry.record.validation:
            macro = entry.record.validation[task].macro
            defined |= {name for name, value in macro.items() if value is not None}
    return defined


def _centre_value(scores: TaskScores, centre: str, metric: str) -> float | None:
    if centre not in scores.centres:
        return None
    return to_finite_float(scores.centres[centre].get_metric(metric))


def _centre_lines(
    rounds: Rounds, centre_names: Sequence[str], read_value: Callable[[CentreRound], float | None]
) -> dict[str, list[float | None]]:
    """Return {centre: one value a round} of what centres replied; None where a centre did not take part."""
    lines: dict[str, list[float | None]] = {}
    for name in centre_names:
        lines[name] = []
        for entry in rounds:
            reply = entry.record.centres.get(name)
            lines[name].append(to_finite_float(read_value(reply)) if reply else None)
    return lines


def build_weight_figures(rounds: Rounds, centre_names: Sequence[str]) -> list[Figure]:
    """Plot the centres' weights in each parameter group, and the effective number of centres."""
    groups: dict[str, None] = {}
    for entry in rounds:
        groups |= dict.fromkeys(entry.record.weights)
    figures = []
    effective: dict[str, Values] = {}
    for group in groups:
        lines: dict[str, Values] = {}
        for name in centre_names:
            lines[name] = [entry.record.weights.get(group, {}).get(name) for entry in rounds]
        figures.append(plot_over_rounds(f"Weights in {group}", "weight", rounds, centre_names, lines))
        effective[group] = [entry.record.effective_centres.get(group) for entry in rounds]
    title = "Effective number of centres"
    summary = plot_over_rounds(title, "centres", rounds, centre_names, {}, effective)
    summary.layout |= LEGEND_LAYOUT
    figures.append(summary)
    for figure in figures:
        figure.layout["yaxis"]["rangemode"] = "tozero"
    return drop_empty(figures)


def build_cost_figures(rounds: Rounds, centre_names: Sequence[str]) -> list[Figure]:
    """Plot the time of each round and centre, and the traffic of each round. Round 0 has neither."""
    if not any(entry.round for entry in rounds):
        return []
    seconds = _centre_lines(rounds, centre_names, lambda reply: reply.seconds)
    title = "Time per round (bars) and training at each centre (lines)"
    time_figure = plot_over_rounds(title, "time, s", rounds, centre_names, seconds)
    total = _round_bars(rounds, "var(--line)", "%{y:.1f} s in total", lambda record: record.seconds)
    time_figure.data.insert(0, total)
    traffic = plot_over_rounds("Traffic per round, all centres", "MB", rounds, centre_names, {})
    down = _round_bars(
        rounds, "var(--soft)", "%{y:.2f} MB to the centres", lambda record: record.bytes_down / 1e6
    )
    up = _round_bars(
        rounds, "var(--accent)", "%{y:.2f} MB from the centres", lambda record: record.bytes_up / 1e6
    )
    traffic.data = [down | {"name": "to the centres"}, up | {"name": "from the centres"}]
    traffic.layout |= LEGEND_LAYOUT
    return [time_figure, traffic]


def _round_bars(
    rounds: Rounds, colour: str, value_text: str, read_value: Callable[[RoundRecord], float]
) -> Trace:
    """Return a bar for every round but a stage's round 0."""
    return {
        "type": "bar",
        "x": list_numbers(rounds),
        "y": [read_value(entry.record) if entry.round else None for entry in rounds],
        "marker": {"color": colour},
        "customdata": label_positions(rounds),
        "hovertemplate": f"%{{customdata}}<br>{value_text}<extra></extra>",
    }


def build_image_statistics_figures(
    image_statistics: Mapping[str, ImageStatistic], centre_names: Sequence[str]
) -> list[Figure]:
    """Plot each centre's histogram of each image statistic."""
    styles = assign_styles(centre_names)
    figures = []
    for statistic in image_statistics.values():
        edges = statistic.bin_edges
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        traces = []
        for centre, fractions in statistic.centres.items():
            hover = f"{html.escape(centre)}<br>%{{x:.3g}}<br>%{{y:.1%}}<extra></extra>"
            trace = make_line_trace(centre, styles[centre], middles, fractions, hover, with_markers=False)
            trace["line"]["shape"] = "hvh"
            traces.append(trace)
        layout = {
            "xaxis": {"title": {"text": statistic.unit}, "range": [edges[0], edges[-1]]},
            "yaxis": {"title": {"text": "fraction of scans"}, "tickformat": ".0%", "rangemode": "tozero"},
        }
        title = statistic.name[:1].upper() + statistic.name[1:]
        figures.append(Figure(title, traces, layout))
    return drop_empty(figures)
