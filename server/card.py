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

from server.figures import COLUMNS, NAMES, Result, Rounds, finite
from server.grids import Grid, columns_of, drift_grid, label_grids, privacy_grid, score_grid, stages_grid, text_of, weights_grid
from server.report import chosen, names_in, rounds_of

KINDS = {
    "binary": "a probability",
    "multiclass": "a probability for each class",
    "regression": "a number",
    "segmentation": "a mask on every kept slice",
}
LEAVES = (
    "counts of scans by class, summed metrics and score histograms, changes of the model's weights with their number of scans and steps"
)
PROTECTED = {
    "none": "No noise was added (no differential privacy): the weights are derived from patients' data and may tell of single patients.",
    "patient": "Training was differentially private at each hospital; the unit is the patient.",
    "central": "The coordinator added noise to each round's sum, so that the model does not tell what one hospital brought in; the unit is the "
    "hospital, and the coordinator itself saw every contribution.",
}
STYLE = """:root{color-scheme:light dark} body{margin:0 auto;padding:28px 24px 60px;max-width:900px;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;font-variant-numeric:tabular-nums} h1{font-size:22px} h2{font-size:17px;margin-top:28px}
table{border-collapse:collapse;font-size:13.5px;display:block;overflow-x:auto} th,td{padding:3px 9px;text-align:left;border-bottom:1px solid #8884}
code{overflow-wrap:anywhere} @media print{body{max-width:none;padding:0}}"""


def card(result: Result, code: str = "", model: str = "") -> str:
    """Markdown. `result`: what `metrics.json` holds; `code`: the fingerprint that the centres approved; `model`: SHA-256 of model.safetensors."""
    config = result.get("config", {})
    rounds = rounds_of(result)
    return "\n".join(
        [
            f"# Model card: {_plain(str(result.get('recipe', '')))}, run {_plain(str(result.get('run', '')))}",
            "",
            *_details(result, config, code, model),
            *_use(config),
            *_data(result),
            *_metrics(result, config),
            *_limits(result, rounds),
            *_privacy(result, config, rounds),
            *_training(result, config, rounds),
            "",
        ]
    )


def page(markdown: str) -> str:
    """The card as one HTML page that loads nothing."""
    title = html.escape(markdown.splitlines()[0].lstrip("# ").replace("\\", ""))
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{title}</title><style>{STYLE}</style></head>\n'
        f"<body><main>\n{body}</main></body></html>\n"
    )


def _details(result: Result, config: Result, code: str, model: str) -> Iterator[str]:
    backbone, kept = config.get("backbone", {}), config.get("preprocess", {})
    tasks = {n: t for n, t in config.get("tasks", {}).items() if t.get("inference", True) and t["kind"] in KINDS}
    yield "## Model details\n"
    yield f"- Encoder: {backbone.get('name')} (timm), starting from {backbone.get('weights')} weights, {backbone.get('pool')} over the slices."
    what = "a radiograph" if kept.get("modality") == "XR" else f"{kept.get('slices')} slices of a scan, chosen by `{kept.get('selection')}`"
    low, high = kept.get("window", (0, 0))
    yield f"- Input: {what}, {kept.get('size')} x {kept.get('size')} pixels, window {low:g} to {high:g} HU."
    yield from (f"- Output `{name}`: {KINDS[task['kind']]}{_classes(task)}." for name, task in tasks.items())
    yield f"- Run: {result.get('mode')}, {result.get('status')}, started {result.get('started', 'at an unknown time')}, seed {result.get('seed')}."
    versions = sorted({f"{k} {v}" for c in result.get("centres", {}).values() for k, v in c.get("versions", {}).items()})
    ours = f"Consilium{f', code {code}' if code else ''}, coordinator PyTorch {version('torch')}"
    yield f"- Software: {ours}; centres: {', '.join(versions) or 'unknown'}."
    yield f"- File: model.safetensors, SHA-256 `{model}`.\n" if model else "- File: none; no common model was saved.\n"


def _classes(task: Mapping[str, Any]) -> str:
    return f" ({', '.join(map(_plain, task['classes']))})" if task.get("classes") else ""


def _use(config: Result) -> Iterator[str]:
    yield "## Intended use\n"
    yield "Research on chest imaging: comparing ways to train across hospitals, and preparing studies at hospitals like those below.\n"
    yield "**To be completed by the model's owner**: the clinical question, the users, and the population it was made for.\n"
    yield "Not for: diagnosis or triage of patients without a study at the place of use and the approval that the law asks for; children, other "
    yield "body parts or modalities; scanners and protocols unlike those it was trained on. It is not a medical device.\n"


def _data(result: Result) -> Iterator[str]:
    yield "## Data by centre\n"
    for grid in label_grids(result):
        yield from _table(grid, f"Scans by centre, split and class: {grid.caption.removesuffix(', scans')}")
    yield "| centre | sources | scans that could not be read |\n|---|---|--:|"
    for name, facts in result.get("centres", {}).items():
        sources = ", ".join(map(str, facts.get("sources", [])))
        yield f"| {_plain(name)} | {_plain(sources)} | {facts.get('skipped', 0)} |"
    yield "\nA cell below a hospital's smallest reportable size is reported as that size.\n"
    drift = drift_grid(result.get("quality", {}))
    if drift.rows:
        yield from _table(drift, drift.caption)


def _metrics(result: Result, config: Result) -> Iterator[str]:
    yield "## Metrics\n"
    test = result.get("test", {})
    if not test:
        yield "The test scans were not touched: the run has not finished.\n"
        return
    threshold = config.get("evaluation", {}).get("threshold", 0.5)
    yield f"On each centre's test scans, touched once, by the round that the last stage took (see Stages); decisions at {threshold:g}.\n"
    for task, scores in test.items():
        columns = [name for name in columns_of(scores) if name in COLUMNS and COLUMNS[name].short]
        yield from _table(score_grid(task, scores, columns), f"Task {task}")


def _limits(result: Result, rounds: Rounds) -> Iterator[str]:
    """What the run itself shows of where not to trust it."""
    task, metric = chosen(result)
    scores = result.get("test", {}).get(task, {})
    name = NAMES.get(metric, metric)
    yield "## Limits\n"
    worst, spread = scores.get("worst", {}).get(metric) or {}, scores.get("spread", {}).get(metric)
    if finite(worst.get("value")) is not None:
        yield f"- Worst centre: {_plain(str(worst['centre']))}, {name} {text_of(worst['value'])}; best less worst {text_of(spread)}."
    for centre, values in scores.get("centres", {}).items():
        if why := values.get("reasons", {}).get(metric):
            yield f"- At {_plain(centre)} {name} is undefined: {_plain(why)}. How the model does there is not known."
        elif finite(values.get("n")) is not None and values["n"] < 50:
            yield f"- At {_plain(centre)} only {values['n']:.0f} test scans: its numbers are uncertain."
    left_out = sorted({str(out["centre"]) for out in result.get("left_out", [])})
    if left_out:
        yield f"- Contributions of {', '.join(map(_plain, left_out))} were left out of some rounds."
    yield from (f"- {_plain(str(note))}" for note in result.get("notes", []))
    yield "- Each centre's test scans come from the same hospital as its training scans: other hospitals may do worse.\n"


def _privacy(result: Result, config: Result, rounds: Rounds) -> Iterator[str]:
    privacy = config.get("privacy", {})
    yield "## Privacy\n"
    looks = ", histograms of what the scans look like" if result.get("quality") else ""
    yield f"What left the hospitals: {LEAVES}{looks}, facts about the centre's software. No image, no identifier, no score of a single scan.\n"
    if result.get("matrix"):
        yield "Each hospital's own model of the last round was sent to the others, to be scored there.\n"
    yield f"{PROTECTED[privacy.get('kind', 'none')]}\n"
    if privacy.get("kind", "none") != "none":
        grid = privacy_grid(rounds, privacy)
        yield from _table(grid, grid.caption)
    if secagg := privacy.get("secagg"):
        hidden = "changes of the weights" if secagg["hide"] == "model" else "changes of the weights, counts and scores"
        yield f"Secure aggregation: the coordinator saw sums of the centres' {hidden}, no centre's own.\n"


def _training(result: Result, config: Result, rounds: Rounds) -> Iterator[str]:
    aggregation = config.get("aggregation", {})
    yield "## Training\n"
    yield f"- Aggregation: {aggregation.get('method')}, centre weights by tau {aggregation.get('tau')} (0: by scans, 1: all alike)."
    yield f"- Changes travel as {aggregation.get('codec')}.\n"
    yield from _table(stages_grid(result, *chosen(result)), "Stages")
    weights = weights_grid(rounds, names_in(result, rounds))
    if weights.rows:
        yield from _table(weights, weights.caption)


def _table(grid: Grid, caption: str) -> Iterator[str]:
    """A grid as Markdown; of column groups, each column names its own."""
    heads = [head.text for head in grid.head[-1]]
    if len(grid.head) > 1:
        groups = [group.text for group in grid.head[0] for _ in range(group.span)]
        heads = [f"{group} {head}".strip() for group, head in zip(groups, heads, strict=True)]
    yield f"**{_plain(caption)}**\n"
    yield f"| {' | '.join(map(_plain, heads))} |"
    yield f"|{'|'.join('--:' if head.number else '---' for head in grid.head[-1])}|"
    for row in grid.rows:
        yield f"| {' | '.join(_plain(' '.join(filter(None, (cell.text, cell.small)))) for cell in row.cells)} |"
    yield ""
    yield from (f"{_plain(note)}\n" for note in grid.notes)


def _plain(text: str) -> str:
    """Text that is no markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))
