"""The model card of a run, made from its result alone: Markdown, and the same as one HTML page.

Its headings are those of Mitchell et al., "Model cards for model reporting" (2019). What a person must add, the use it was really made for, cannot be
known here and is marked so.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from markdown_it import MarkdownIt

from server.reporting.figures import METRIC_COLUMNS, METRIC_NAMES, Rounds, RunResult, to_finite_float
from server.reporting.report import list_centre_names, list_rounds, primary_task_metric
from server.reporting.report_tables import (
    ReportTable,
    build_drift_table,
    build_label_count_tables,
    build_privacy_table,
    build_score_table,
    build_stage_table,
    build_weight_table,
    format_number,
    list_metrics,
)

OUTPUT_DESCRIPTIONS = {
    "binary": "a probability",
    "multiclass": "a probability for each class",
    "regression": "a number",
    "segmentation": "a mask on every kept slice",
}
EGRESS_SUMMARY = "counts of scans by class, summed metrics and score histograms, changes of the model's weights with their number of scans and steps"
PRIVACY_STATEMENTS = {
    "none": "No noise was added (no differential privacy): the weights are derived from patients' data and may tell of single patients.",
    "patient": "Training was differentially private at each hospital; the unit is the patient.",
    "central": "The coordinator added noise to each round's sum, so that the model does not tell what one hospital brought in; the unit is the "
    "hospital, and the coordinator itself saw every contribution.",
}
CARD_CSS = """:root{color-scheme:light dark} body{margin:0 auto;padding:28px 24px 60px;max-width:900px;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;font-variant-numeric:tabular-nums} h1{font-size:22px} h2{font-size:17px;margin-top:28px}
table{border-collapse:collapse;font-size:13.5px;display:block;overflow-x:auto} th,td{padding:3px 9px;text-align:left;border-bottom:1px solid #8884}
code{overflow-wrap:anywhere} @media print{body{max-width:none;padding:0}}"""


def render_card_markdown(result: RunResult, code_fingerprint: str = "", model_digest: str = "") -> str:
    """Markdown. `result`: what `metrics.json` holds; `code`: the fingerprint that the centres approved; `model`: SHA-256 of model.safetensors."""
    config = result.get("config", {})
    rounds = list_rounds(result)
    return "\n".join(
        [
            f"# Model card: {_escape_markdown(str(result.get('recipe', '')))}, run {_escape_markdown(str(result.get('run', '')))}",
            "",
            *_details_section(result, config, code_fingerprint, model_digest),
            *_intended_use_section(config),
            *_data_section(result),
            *_metrics_section(result, config),
            *_limits_section(result, rounds),
            *_privacy_section(result, config, rounds),
            *_training_section(result, config, rounds),
            "",
        ]
    )


def render_card_html(markdown: str) -> str:
    """The card as one HTML page that loads nothing."""
    title = html.escape(markdown.splitlines()[0].lstrip("# ").replace("\\", ""))
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{title}</title><style>{CARD_CSS}</style></head>\n'
        f"<body><main>\n{body}</main></body></html>\n"
    )


def _details_section(
    result: RunResult, config: RunResult, code_fingerprint: str, model_digest: str
) -> Iterator[str]:
    backbone, kept = config.get("backbone", {}), config.get("preprocess", {})
    tasks = {
        n: t
        for n, t in config.get("tasks", {}).items()
        if t.get("inference", True) and t["kind"] in OUTPUT_DESCRIPTIONS
    }
    yield "## Model details\n"
    yield f"- Encoder: {backbone.get('name')} (timm), starting from {backbone.get('weights')} weights, {backbone.get('pool')} over the slices."
    what = (
        "a radiograph"
        if kept.get("modality") == "XR"
        else f"{kept.get('slices')} slices of a scan, chosen by `{kept.get('selection')}`"
    )
    low, high = kept.get("window", (0, 0))
    yield f"- Input: {what}, {kept.get('size')} x {kept.get('size')} pixels, window {low:g} to {high:g} HU."
    yield from (
        f"- Output `{name}`: {OUTPUT_DESCRIPTIONS[task['kind']]}{_format_classes(task)}."
        for name, task in tasks.items()
    )
    yield f"- Run: {result.get('mode')}, {result.get('status')}, started {result.get('started', 'at an unknown time')}, seed {result.get('seed')}."
    versions = sorted(
        {f"{k} {v}" for c in result.get("centres", {}).values() for k, v in c.get("versions", {}).items()}
    )
    ours = f"Consilium{f', code {code_fingerprint}' if code_fingerprint else ''}, coordinator PyTorch {version('torch')}"
    yield f"- Software: {ours}; centres: {', '.join(versions) or 'unknown'}."
    yield (
        f"- File: model.safetensors, SHA-256 `{model_digest}`.\n"
        if model_digest
        else "- File: none; no common model was saved.\n"
    )


def _format_classes(task: Mapping[str, Any]) -> str:
    return f" ({', '.join(map(_escape_markdown, task['classes']))})" if task.get("classes") else ""


def _intended_use_section(config: RunResult) -> Iterator[str]:
    yield "## Intended use\n"
    yield "Research on chest imaging: comparing ways to train across hospitals, and preparing studies at hospitals like those below.\n"
    yield "**To be completed by the model's owner**: the clinical question, the users, and the population it was made for.\n"
    yield "Not for: diagnosis or triage of patients without a study at the place of use and the approval that the law asks for; children, other "
    yield "body parts or modalities; scanners and protocols unlike those it was trained on. It is not a medical device.\n"


def _data_section(result: RunResult) -> Iterator[str]:
    yield "## Data by centre\n"
    for grid in build_label_count_tables(result):
        yield from _format_table(
            grid, f"Scans by centre, split and class: {grid.caption.removesuffix(', scans')}"
        )
    yield "| centre | sources | scans that could not be read |\n|---|---|--:|"
    for name, facts in result.get("centres", {}).items():
        sources = ", ".join(map(str, facts.get("sources", [])))
        yield f"| {_escape_markdown(name)} | {_escape_markdown(sources)} | {facts.get('skipped', 0)} |"
    yield "\nA cell below a hospital's smallest reportable size is reported as that size.\n"
    drift = build_drift_table(result.get("quality", {}))
    if drift.rows:
        yield from _format_table(drift, drift.caption)


def _metrics_section(result: RunResult, config: RunResult) -> Iterator[str]:
    yield "## Metrics\n"
    test = result.get("test", {})
    if not test:
        yield "The test scans were not touched: the run has not finished.\n"
        return
    threshold = config.get("evaluation", {}).get("threshold", 0.5)
    yield f"On each centre's test scans, touched once, by the round that the last stage took (see Stages); decisions at {threshold:g}.\n"
    for task, scores in test.items():
        columns = [
            name
            for name in list_metrics(scores)
            if name in METRIC_COLUMNS and METRIC_COLUMNS[name].short_name
        ]
        yield from _format_table(build_score_table(task, scores, columns), f"Task {task}")


def _limits_section(result: RunResult, rounds: Rounds) -> Iterator[str]:
    """What the run itself shows of where not to trust it."""
    task, metric = primary_task_metric(result)
    scores = result.get("test", {}).get(task, {})
    name = METRIC_NAMES.get(metric, metric)
    yield "## Limits\n"
    worst, spread = scores.get("worst", {}).get(metric) or {}, scores.get("spread", {}).get(metric)
    if to_finite_float(worst.get("value")) is not None:
        yield f"- Worst centre: {_escape_markdown(str(worst['centre']))}, {name} {format_number(worst['value'])}; best less worst {format_number(spread)}."
    for centre, values in scores.get("centres", {}).items():
        if why := values.get("reasons", {}).get(metric):
            yield f"- At {_escape_markdown(centre)} {name} is undefined: {_escape_markdown(why)}. How the model does there is not known."
        elif to_finite_float(values.get("n")) is not None and values["n"] < 50:
            yield f"- At {_escape_markdown(centre)} only {values['n']:.0f} test scans: its numbers are uncertain."
    left_out = sorted({str(out["centre"]) for out in result.get("left_out", [])})
    if left_out:
        yield f"- Contributions of {', '.join(map(_escape_markdown, left_out))} were left out of some rounds."
    yield from (f"- {_escape_markdown(str(note))}" for note in result.get("notes", []))
    yield "- Each centre's test scans come from the same hospital as its training scans: other hospitals may do worse.\n"


def _privacy_section(result: RunResult, config: RunResult, rounds: Rounds) -> Iterator[str]:
    privacy = config.get("privacy", {})
    yield "## Privacy\n"
    looks = ", histograms of what the scans look like" if result.get("quality") else ""
    yield f"What left the hospitals: {EGRESS_SUMMARY}{looks}, facts about the centre's software. No image, no identifier, no score of a single scan.\n"
    if result.get("matrix"):
        yield "Each hospital's own model of the last round was sent to the others, to be scored there.\n"
    yield f"{PRIVACY_STATEMENTS[privacy.get('kind', 'none')]}\n"
    if privacy.get("kind", "none") != "none":
        grid = build_privacy_table(rounds, privacy)
        yield from _format_table(grid, grid.caption)
    if secagg := privacy.get("secagg"):
        hidden = (
            "changes of the weights"
            if secagg["hide"] == "model"
            else "changes of the weights, counts and scores"
        )
        yield f"Secure aggregation: the coordinator saw sums of the centres' {hidden}, no centre's own.\n"


def _training_section(result: RunResult, config: RunResult, rounds: Rounds) -> Iterator[str]:
    aggregation = config.get("aggregation", {})
    yield "## Training\n"
    yield f"- Aggregation: {aggregation.get('method')}, centre weights by tau {aggregation.get('tau')} (0: by scans, 1: all alike)."
    yield f"- Changes travel as {aggregation.get('codec')}.\n"
    yield from _format_table(build_stage_table(result, *primary_task_metric(result)), "Stages")
    weights = build_weight_table(rounds, list_centre_names(result, rounds))
    if weights.rows:
        yield from _format_table(weights, weights.caption)


def _format_table(table: ReportTable, caption: str) -> Iterator[str]:
    """A grid as Markdown; of column groups, each column names its own."""
    heads = [head.text for head in table.header_rows[-1]]
    if len(table.header_rows) > 1:
        groups = [group.text for group in table.header_rows[0] for _ in range(group.column_span)]
        heads = [f"{group} {head}".strip() for group, head in zip(groups, heads, strict=True)]
    yield f"**{_escape_markdown(caption)}**\n"
    yield f"| {' | '.join(map(_escape_markdown, heads))} |"
    yield f"|{'|'.join('--:' if head.is_numeric else '---' for head in table.header_rows[-1])}|"
    for row in table.rows:
        yield f"| {' | '.join(_escape_markdown(' '.join(filter(None, (cell.text, cell.subtext)))) for cell in row.cells)} |"
    yield ""
    yield from (f"{_escape_markdown(note)}\n" for note in table.notes)


def _escape_markdown(text: str) -> str:
    """Text that is no markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))
