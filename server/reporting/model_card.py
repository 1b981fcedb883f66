"""The model card of a run, made from its result alone: as Markdown, and the same as one HTML page.

The headings are those of Mitchell et al., "Model Cards for Model Reporting" (2019). The card marks what a
person must add: what the model is really meant for cannot be read from a result.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

from markdown_it import MarkdownIt

from common.config.parse import parse_config
from common.config.schema import Config, PreprocessConfig, Task
from server.reporting.centre_tables import build_drift_table, build_label_count_tables
from server.reporting.labels import View, format_number, label_metric, to_finite_float
from server.reporting.markdown import escape_markdown, format_table, join_names
from server.reporting.numbered_rounds import list_rounds
from server.reporting.report_tables import (
    build_privacy_table,
    build_score_table,
    build_stage_table,
    build_weight_table,
)
from server.reporting.result_summary import (
    get_label_counts,
    get_selection_metric,
    list_centre_names,
    primary_task_metric,
)
from server.reporting.scores import list_short_metrics, view_value
from server.run.records import CentreScores, RunResult

FEW_TEST_SCANS = 50  # below it the card warns that a centre's numbers are uncertain
OUTPUT_DESCRIPTIONS = {  # task types that predict something
    "binary": "a probability",
    "multiclass": "a probability for each class",
    "regression": "a number",
    "segmentation": "a mask of every slice",
}
SENT_DATA = (
    "counts of scans by class, summed metrics and score histograms, updates of the model's weights with "
    "their number of scans and steps"
)
PRIVACY_STATEMENTS = {
    "none": "No noise was added (no differential privacy): the weights are derived from patients' data and "
    "may reveal information about single patients.",
    "patient": "Training was differentially private at each hospital; the unit is the patient.",
    "central": "The coordinator added noise to each round's sum, so that the model does not reveal what one "
    "hospital contributed; the unit is the hospital, and the coordinator itself saw every contribution.",
}
CARD_CSS = """\
:root { color-scheme: light dark }
body { margin:0 auto; padding:28px 24px 60px; max-width:900px; font-variant-numeric:tabular-nums;
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif }
h1 { font-size:22px } h2 { font-size:17px; margin-top:28px }
table { border-collapse:collapse; font-size:13.5px; display:block; overflow-x:auto }
th, td { padding:3px 9px; text-align:left; border-bottom:1px solid #8884 }
code { overflow-wrap:anywhere }
@media print { body { max-width:none; padding:0 } }
"""


@dataclass
class CardInput:
    """What a card is made from."""

    result: RunResult
    code_fingerprint: str = ""  # of the code that the centres approved
    model_digest: str = ""  # SHA-256 of model.safetensors; empty: no common model was saved

    @cached_property
    def config(self) -> Config:
        """The run's configuration."""
        return parse_config(self.result.config)


def render_card_markdown(card: CardInput) -> str:
    """Return the card as Markdown."""
    title = f"{escape_markdown(card.result.recipe)}, run {escape_markdown(card.result.run_id)}"
    sections: list[Callable[[CardInput], Iterator[str]]] = [
        _details_section,
        _intended_use_section,
        _data_section,
        _metrics_section,
        _limits_section,
        _privacy_section,
        _training_section,
    ]
    lines = [f"# Model card: {title}", ""]
    for section in sections:
        lines += section(card)
    return "\n".join([*lines, ""])


def render_card_html(markdown: str) -> str:
    """Return the card as one HTML page that loads nothing."""
    title = html.escape(markdown.splitlines()[0].lstrip("# ").replace("\\", ""))
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{CARD_CSS}</style></head>
<body><main>
{body}</main></body></html>
"""


def _details_section(card: CardInput) -> Iterator[str]:
    result, config = card.result, card.config
    backbone = config.backbone
    yield "## Model details\n"
    yield (
        f"- Encoder: {backbone.name} (timm), starting from {backbone.weights} weights, "
        f"{backbone.slice_pooling} over the slices."
    )
    yield f"- Input: {_describe_input(config.preprocess)}."
    for name, task in config.tasks.items():
        if task.inference and task.type in OUTPUT_DESCRIPTIONS:
            yield f"- Output `{name}`: {OUTPUT_DESCRIPTIONS[task.type]}{_list_class_names(task)}."
    started = result.started or "at an unknown time"
    yield f"- Run: {result.mode}, {result.status}, started {started}, seed {result.seed}."
    yield f"- Software: {_describe_software(card)}."
    if card.model_digest:
        yield f"- File: model.safetensors, SHA-256 `{card.model_digest}`.\n"
    else:
        yield "- File: none; no common model was saved.\n"


def _describe_input(preprocess: PreprocessConfig) -> str:
    if preprocess.modality == "XR":
        scan = "a radiograph"
    else:
        scan = f"{preprocess.num_slices} slices of a scan, selected by `{preprocess.selection}`"
    low, high = preprocess.window
    size = preprocess.image_size
    return f"{scan}, {size} x {size} pixels, window {low:g} to {high:g} HU"


def _list_class_names(task: Task) -> str:
    if not task.classes:
        return ""
    return f" ({join_names(task.classes)})"


def _describe_software(card: CardInput) -> str:
    versions: set[str] = set()
    for centre in card.result.centres.values():
        versions |= {f"{package} {number}" for package, number in centre.versions.items()}
    package = "Consilium"
    if card.code_fingerprint:
        package += f", code {card.code_fingerprint}"
    centres = ", ".join(sorted(versions)) or "unknown"
    return f"{package}, coordinator PyTorch {version('torch')}; centres: {centres}"


def _intended_use_section(card: CardInput) -> Iterator[str]:
    yield "## Intended use\n"
    yield (
        "Research on chest imaging: comparing ways to train across hospitals, and preparing studies at "
        "hospitals like those below.\n"
    )
    yield (
        "**To be completed by the model's owner**: the clinical question, the users, and the population it "
        "was made for.\n"
    )
    yield (
        "Not for: diagnosis or triage of patients without a study at the place of use and the approval that "
        "the law requires; children, other body parts or modalities; scanners and protocols unlike those it "
        "was trained on. It is not a medical device.\n"
    )


def _data_section(card: CardInput) -> Iterator[str]:
    result = card.result
    yield "## Data by centre\n"
    for table in build_label_count_tables(get_label_counts(result)):
        task = table.caption.removesuffix(", scans")
        yield from format_table(table, f"Scans by centre, split and class: {task}")
    yield "| centre | sources | unreadable scans |\n|---|---|--:|"
    for name, centre in result.centres.items():
        sources = escape_markdown(", ".join(centre.sources))
        yield f"| {escape_markdown(name)} | {sources} | {centre.skipped} |"
    yield "\nA count below a hospital's smallest reportable count is reported as that count.\n"
    drift = build_drift_table(result.image_statistics)
    if drift.rows:
        yield from format_table(drift, drift.caption)


def _metrics_section(card: CardInput) -> Iterator[str]:
    yield "## Metrics\n"
    if not card.result.test:
        yield "The test scans were not used: the run has not finished.\n"
        return
    yield (
        "On each centre's test scans, used once, by the best round of the last stage (see Stages); decision "
        f"threshold {card.config.evaluation.threshold:g}.\n"
    )
    for task, scores in card.result.test.items():
        yield from format_table(build_score_table(task, scores, list_short_metrics(scores)), f"Task {task}")


def _limits_section(card: CardInput) -> Iterator[str]:
    """Say where the run's own numbers give reason not to trust the model."""
    result = card.result
    yield "## Limits\n"
    task, metric = primary_task_metric(result)
    scores = result.test.get(task)
    name = label_metric(metric)
    if scores:
        worst, centre = view_value(scores, View.WORST, metric)
        spread = format_number(scores.spread.get(metric))
        if to_finite_float(worst) is not None:
            worst_centre = f"{escape_markdown(centre)}, {name} {format_number(worst)}"
            yield f"- Worst centre: {worst_centre}; best minus worst {spread}."
        for centre, centre_scores in scores.centres.items():
            yield from _list_centre_limits(escape_markdown(centre), centre_scores, metric)
    left_out = sorted({exclusion.centre for exclusion in result.left_out})
    if left_out:
        yield f"- Contributions of {join_names(left_out)} were left out of some rounds."
    for note in result.notes:
        yield f"- {escape_markdown(note)}"
    yield (
        "- Each centre's test scans come from the same hospital as its training scans: other hospitals may "
        "do worse.\n"
    )


def _list_centre_limits(centre: str, scores: CentreScores, metric: str) -> Iterator[str]:
    reason = scores.reasons.get(metric)
    num_scans = to_finite_float(scores.metrics.get("n"))
    if reason:
        undefined = f"{label_metric(metric)} is undefined: {escape_markdown(reason)}"
        yield f"- At {centre} {undefined}. How well the model does there is unknown."
    elif num_scans is not None and num_scans < FEW_TEST_SCANS:
        yield f"- At {centre} only {num_scans:.0f} test scans: its numbers are uncertain."


def _privacy_section(card: CardInput) -> Iterator[str]:
    privacy = card.config.privacy
    yield "## Privacy\n"
    sent_data = SENT_DATA
    if card.result.image_statistics:
        sent_data += ", histograms of image statistics"
    yield (
        f"Data that left the hospitals: {sent_data}, versions of the centre's software. No image, no "
        "identifier, no score of a single scan.\n"
    )
    if card.result.cross_site:
        yield "Each hospital's own model of the last round was sent to the others, to be scored there.\n"
    yield f"{PRIVACY_STATEMENTS[privacy.dp_level]}\n"
    if privacy.dp_level != "none":
        table = build_privacy_table(list_rounds(card.result), privacy)
        yield from format_table(table, table.caption)
    if privacy.secagg:
        hidden = "weight updates"
        if privacy.secagg.scope == "all":
            hidden = "weight updates, counts and scores"
        yield f"Secure aggregation: the coordinator saw the centres' {hidden} as sums only.\n"


def _training_section(card: CardInput) -> Iterator[str]:
    result, aggregation = card.result, card.config.aggregation
    yield "## Training\n"
    weights = f"centre weights by tau {aggregation.tau} (0: by number of scans, 1: all equal)"
    yield f"- Aggregation: {aggregation.method}, {weights}."
    yield f"- Updates are sent as {aggregation.compression}.\n"
    yield from format_table(build_stage_table(result, get_selection_metric(result)), "Stages")
    table = build_weight_table(list_rounds(result), list_centre_names(result))
    if table.rows:
        yield from format_table(table, table.caption)
