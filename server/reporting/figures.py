"""The report's figures: plotly's data and layout as plain dicts. Colours are variables of the page, see `server/reporting/report_template.py`.

A centre keeps its colour, dash and mark in every figure; what is over all centres is bold in the colour of the text.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from common.learning.metrics import compute_calibration_curve, compute_roc_curve, primary_metric

RunResult = Mapping[str, Any]
Figure = dict[str, Any]
Rounds = list[tuple[int, str, RunResult]]  # (place over all stages, stage, round)


class MetricColumn(NamedTuple):
    """How a metric is shown."""

    name: str
    short_name: str = ""  # in the terminal, where it is left out without one
    decimals: int = 3


# Of all kinds of tasks, in the order in which they stand side by side; a task's table has those that its kind knows.
METRIC_COLUMNS = {
    "n": MetricColumn("scans", "scans", 0),
    "positives": MetricColumn("positive", "pos.", 0),
    "auc": MetricColumn("ROC-AUC", "AUC"),
    "f1": MetricColumn("F1", "F1"),
    "dice": MetricColumn("Dice", "Dice"),
    "dice_affected": MetricColumn("Dice where affected", "Dice aff."),
    "dice_pixels": MetricColumn("Dice of all pixels", "Dice pix."),
    "sensitivity": MetricColumn("sensitivity", "sens."),
    "specificity": MetricColumn("specificity", "spec."),
    "precision": MetricColumn("precision"),
    "balanced_accuracy": MetricColumn("balanced accuracy", "bal. acc."),
    "gmean": MetricColumn("G-mean"),
    "accuracy": MetricColumn("accuracy"),
    "mae": MetricColumn("mean absolute error", "MAE"),
    "rmse": MetricColumn("root mean squared error", "RMSE"),
    "r2": MetricColumn("R²", "R²"),
    "pearson": MetricColumn("Pearson's r", "r"),
    "spearman": MetricColumn("Spearman's rho", "rho"),
    "ece": MetricColumn("calibration error", "cal. err."),
    "brier": MetricColumn("Brier score"),
    "loss": MetricColumn("loss"),
}
METRIC_NAMES = {metric: column.name for metric, column in METRIC_COLUMNS.items()}
NUM_COLOURS, DASH_STYLES = 7, ("solid", "dash", "dot", "dashdot")
LEGEND_LAYOUT = {
    "showlegend": True,
    "legend": {"orientation": "h", "y": 1.07, "yanchor": "bottom", "x": 0},
    "margin": {"t": 44},
}  # in the figure
MARKER_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")


def build_score_figures(
    task: str, histograms: Mapping[str, Any], centre_names: Sequence[str]
) -> list[Figure]:
    arrays = {centre: np.asarray(hist, float) for centre, hist in histograms.items()}
    curves, points = [], []
    diagonal = {
        "x": [0, 1],
        "y": [0, 1],
        "mode": "lines",
        "line": {"color": "var(--line)", "width": 1},
        "hoverinfo": "skip",
    }
    for centre, hist in (*arrays.items(), ("pooled", np.sum(list(arrays.values()), axis=0))):
        own = centre in arrays
        fpr, tpr = compute_roc_curve(hist)
        if fpr.size:
            hover = f"{html.escape(centre)}<br>1 − specificity %{{x:.3f}}<br>sensitivity %{{y:.3f}}<extra></extra>"
            curves.append(make_line_trace(centre, centre_names, fpr, tpr, hover, own, with_markers=False))
        if hist.sum():
            predicted, observed, n = compute_calibration_curve(hist)
            hover = f"{html.escape(centre)}<br>predicted %{{x:.3f}}<br>observed %{{y:.3f}}<br>%{{customdata}} scans<extra></extra>"
            trace = make_line_trace(centre, centre_names, predicted, observed, hover, own)
            trace["marker"]["size"] = [round(4 + 10 * math.sqrt(k / n.max()), 1) for k in n]
            trace["marker"]["opacity"] = 0.8
            points.append({**trace, "cliponaxis": False, "customdata": [int(k) for k in n]})
    square = {"range": [-0.02, 1.02], "dtick": 0.2}
    figures = []
    for title, data, x, y in (
        (f"{task}: ROC on the test scans; pooled bold", curves, "1 − specificity", "sensitivity"),
        (
            f"{task}: calibration on the test scans; pooled bold",
            points,
            "mean predicted probability",
            "observed share of positives",
        ),
    ):
        layout = {"xaxis": {**square, "title": {"text": x}}, "yaxis": {**square, "title": {"text": y}}}
        figures.append({"title": title, "data": [diagonal, *data], "layout": layout})
    return figures


def build_round_figures(
    rounds: Rounds, centre_names: Sequence[str], primary_task: str, metric: str
) -> list[Figure]:
    """Validation by centre for every task by `metric` or, where it has no such, its leading one; then the loss."""
    figures = []
    tasks = dict.fromkeys(task for _, _, r in rounds for task in r.get("val", {}))
    for task in sorted(tasks, key=lambda name: name != primary_task):
        known = {
            name
            for _, _, r in rounds
            for name, v in r.get("val", {}).get(task, {}).get("macro", {}).items()
            if v is not None
        }
        shown = primary_metric(metric, known)
        lines = {
            name: [
                to_finite_float(r.get("val", {}).get(task, {}).get("centres", {}).get(name, {}).get(shown))
                for _, _, r in rounds
            ]
            for name in centre_names
        }
        mean = [
            to_finite_float(r.get("val", {}).get(task, {}).get("macro", {}).get(shown)) for _, _, r in rounds
        ]
        label = METRIC_NAMES.get(shown, shown)
        figures.append(
            plot_over_rounds(
                f"{task}: {label} on validation; mean of centres bold",
                label,
                rounds,
                centre_names,
                lines,
                {"mean of centres": mean},
            )
        )
    losses = {
        name: [to_finite_float(r.get("centres", {}).get(name, {}).get("loss")) for _, _, r in rounds]
        for name in centre_names
    }
    figures.append(plot_over_rounds("Training loss", "loss", rounds, centre_names, losses))
    return [figure for figure in figures if figure["data"]]


def build_weight_figures(rounds: Rounds, centre_names: Sequence[str]) -> list[Figure]:
    parts = list(dict.fromkeys(part for _, _, r in rounds for part in r.get("weights", {})))
    figures = []
    for part in parts:
        lines = {
            name: [to_finite_float(r.get("weights", {}).get(part, {}).get(name)) for _, _, r in rounds]
            for name in centre_names
        }
        figure = plot_over_rounds(f"Share in {part}", "weight", rounds, centre_names, lines)
        figure["layout"]["yaxis"]["rangemode"] = "tozero"
        figures.append(figure)
    effective = {
        part: [to_finite_float(r.get("effective", {}).get(part)) for _, _, r in rounds] for part in parts
    }
    figure = plot_over_rounds("Effective number of centres", "centres", rounds, centre_names, {}, effective)
    figure["layout"] |= LEGEND_LAYOUT
    figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return [f for f in (*figures, figure) if f["data"]]


def build_cost_figures(rounds: Rounds, centre_names: Sequence[str]) -> list[Figure]:
    x = [i for i, _, _ in rounds]
    if not any(r["round"] for _, _, r in rounds):
        return []
    seconds = {
        name: [to_finite_float(r.get("centres", {}).get(name, {}).get("seconds")) for _, _, r in rounds]
        for name in centre_names
    }
    time = plot_over_rounds(
        "Time a round (bars) and training at each centre (lines)", "time, s", rounds, centre_names, seconds
    )
    taken = [to_finite_float(r.get("seconds")) if r["round"] else None for _, _, r in rounds]
    bar = {"type": "bar", "x": x, "y": taken, "marker": {"color": "var(--line)"}}
    bar |= {"customdata": [f"{html.escape(str(stage))}, round {r['round']}" for _, stage, r in rounds]}
    time["data"].insert(0, {**bar, "hovertemplate": "%{customdata}<br>%{y:.1f} s in all<extra></extra>"})
    traffic = plot_over_rounds("Traffic of a round, all centres", "MB", rounds, centre_names, {})
    for key, label, colour in (
        ("bytes_down", "to the centres", "var(--soft)"),
        ("bytes_up", "from the centres", "var(--accent)"),
    ):
        y = [r[key] / 1e6 if r["round"] and r.get(key) is not None else None for _, _, r in rounds]
        hover = f"%{{customdata}}<br>%{{y:.2f}} MB {label}<extra></extra>"
        traffic["data"].append(
            {**bar, "y": y, "name": label, "marker": {"color": colour}, "hovertemplate": hover}
        )
    traffic["layout"] |= LEGEND_LAYOUT
    return [time, traffic]


def build_cross_site_figures(
    cross_site: RunResult, centre_names: Sequence[str], primary_task: str, metric: str
) -> list[Figure]:
    """Heat maps of the local models (rows) at every centre (columns), one a task."""
    figures = []
    for task in sorted(cross_site.get("tasks", {}), key=lambda name: name != primary_task):
        models = {
            name: cross_site["tasks"][task][name]
            for name in centre_names
            if name in cross_site["tasks"][task]
        }
        places = [name for name in centre_names if any(name in row for row in models.values())]
        shown = primary_metric(
            metric,
            {
                name
                for row in models.values()
                for of in row.values()
                for name, v in of.items()
                if v is not None
            },
        )
        cells = [[models[model].get(place, {}) for place in places] for model in models]
        value = [[to_finite_float(cell.get(shown)) for cell in row] for row in cells]
        why = [
            [cell.get("reasons", {}).get(shown) or ("not asked" if not cell else "") for cell in row]
            for row in cells
        ]
        label = METRIC_NAMES.get(shown, shown)
        cellwise = {
            "type": "heatmap",
            "x": [html.escape(place) for place in places],
            "y": [html.escape(model) for model in models],
            "z": value,
            "text": [["–" if v is None else f"{v:.3f}" for v in row] for row in value],
            "texttemplate": "%{text}",
            "customdata": [[html.escape(w and f"undefined: {w}") for w in row] for row in why],
            "hovertemplate": f"trained at %{{y}}, scored at %{{x}}<br>{label} %{{text}} %{{customdata}}<extra></extra>",
            "colorscale": [[0, "var(--wash)"], [1, "var(--accent)"]],
            "showscale": False,
            "hoverongaps": True,
            "xgap": 2,
            "ygap": 2,
        }
        layout = {
            "xaxis": {"title": {"text": "scored at"}, "type": "category", "showgrid": False},
            "yaxis": {
                "title": {"text": "trained at"},
                "type": "category",
                "autorange": "reversed",
                "showgrid": False,
            },
        }
        figures.append(
            {
                "title": f"{task}: {label} of each centre's own model at every centre",
                "data": [cellwise],
                "layout": layout,
            }
        )
    return figures


def build_image_statistics_figures(image_statistics: RunResult, centre_names: Sequence[str]) -> list[Figure]:
    """Each centre's histogram of each measure."""
    figures = []
    for measure in image_statistics.values():
        edges = measure["edges"]
        middle = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        data = []
        for centre, shares in measure["centres"].items():
            hover = f"{html.escape(centre)}<br>%{{x:.3g}}<br>%{{y:.1%}}<extra></extra>"
            one = make_line_trace(
                centre, centre_names, middle, shares, hover, is_centre=True, with_markers=False
            )
            data.append({**one, "line": one["line"] | {"shape": "hvh"}})
        layout = {
            "xaxis": {"title": {"text": measure["unit"]}, "range": [edges[0], edges[-1]]},
            "yaxis": {"title": {"text": "share"}, "tickformat": ".0%", "rangemode": "tozero"},
        }
        figures.append(
            {"title": f"{measure['name'][:1].upper()}{measure['name'][1:]}", "data": data, "layout": layout}
        )
    return [figure for figure in figures if figure["data"]]


def plot_over_rounds(
    title: str,
    y_label: str,
    rounds: Rounds,
    centre_names: Sequence[str],
    centre_lines: Mapping[str, Sequence[float | None]],
    summary_lines: Mapping[str, Sequence[float | None]] | None = None,
) -> Figure:
    """Lines over all rounds, stages one after the other; `lines` are centres', `bold` are over all of them."""
    x = [i for i, _, _ in rounds]
    where = [f"{html.escape(str(stage))}, round {r['round']}" for _, stage, r in rounds]
    data = []
    for own, some in ((True, centre_lines), (False, summary_lines or {})):
        for k, (name, y) in enumerate(some.items()):
            if any(v is not None for v in y):
                hover = f"{html.escape(name)}<br>%{{customdata}}<br>{y_label} %{{y:.4g}}<extra></extra>"
                trace = make_line_trace(name, centre_names, x, y, hover, own)
                if not own and len(summary_lines or {}) > 1:
                    trace["line"] |= {"dash": DASH_STYLES[k % len(DASH_STYLES)], "width": 1.5}
                    trace["marker"] |= {"symbol": MARKER_SYMBOLS[k % len(MARKER_SYMBOLS)]}
                data.append({**trace, "customdata": where})
    starts = [(i, stage) for k, (i, stage, _) in enumerate(rounds) if k == 0 or rounds[k - 1][1] != stage]
    several = len(starts) > 1
    dotted = {
        "type": "line",
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": "var(--soft)", "width": 1, "dash": "dot"},
    }
    shapes = [{**dotted, "x0": i - 0.5, "x1": i - 0.5} for i, _ in starts[1:]]
    above = {"y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "left", "showarrow": False}
    texts = [{**above, "x": i - 0.4, "text": html.escape(str(stage))[:24]} for i, stage in starts]
    shown = rounds[
        :: -(-len(rounds) // 16) or 1
    ]  # as many numbers as there is room for; each stage counts its own rounds
    ticks = {"tickvals": [i for i, _, _ in shown], "ticktext": [str(r["round"]) for _, _, r in shown]}
    xaxis = {"title": {"text": "round"}, "range": [min(x, default=0) - 0.5, max(x, default=1) + 0.5], **ticks}
    layout: dict[str, Any] = {"xaxis": xaxis, "yaxis": {"title": {"text": y_label}}}
    if several:
        layout |= {"shapes": shapes, "annotations": texts, "margin": {"t": 22}}
    return {"title": title, "data": data, "layout": layout}


def make_line_trace(
    name: str,
    centre_names: Sequence[str],
    x: Iterable[Any],
    y: Iterable[Any],
    hover: str,
    is_centre: bool,
    with_markers: bool = True,
) -> dict[str, Any]:
    """A centre's line in its colour, dash and mark, or (not `own`) a bold one over all centres. The legend's buttons hide by `meta`."""
    i = list(centre_names).index(name) if is_centre else 0
    colour = f"var(--c{i % NUM_COLOURS})" if is_centre else "var(--ink)"
    trace = {
        "x": list(x),
        "y": list(y),
        "name": html.escape(name),  # plotly reads a little HTML in names
        "mode": "lines+markers" if with_markers else "lines",
        "line": {
            "color": colour,
            "width": 1.5 if is_centre else 2.5,
            "dash": pick_dash_style(i) if is_centre else "solid",
        },
        "marker": {"color": colour, "size": 5, "symbol": MARKER_SYMBOLS[i % len(MARKER_SYMBOLS)]},
        "hovertemplate": hover,
    }
    return {**trace, "meta": i} if is_centre else trace


def to_finite_float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def pick_dash_style(centre_index: int) -> str:
    return DASH_STYLES[centre_index // NUM_COLOURS % len(DASH_STYLES)]
