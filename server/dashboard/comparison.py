"""What the comparison page shows: the settings in which runs differ, and their outcomes side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.dashboard.render import format_duration_or_dash
from server.ledger import views
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring.run_history import ScoreHistory, load_test_scores
from server.reporting.labels import VIEW_LABELS, format_number_or_dash, label_metric
from server.reporting.scores import view_value
from server.run.records import TaskScores

NOT_SET = "–"


def comparison_view(
    ledger: Ledger, rows: Sequence[Row], histories: Mapping[str, ScoreHistory]
) -> dict[str, Any]:
    """Return {"differences": {setting: text of each run}, "outcomes": {outcome: text of each run}}.

    Scores are those of the first run's task and metric. `histories` are by run id.
    """
    first_history = histories[rows[0]["id"]]
    outcomes = []
    for row in rows:
        test_texts = describe_test_scores(
            load_test_scores(ledger, row["id"]), first_history.task, first_history.metric
        )
        run_texts = describe_run(ledger, row["id"], histories[row["id"]])
        outcomes.append({"status": row["status"], **test_texts, **run_texts})
    return {
        "differences": list_differences([flatten_config(row["config"]) for row in rows]),
        "outcomes": {label: [texts[label] for texts in outcomes] for label in outcomes[0]},
    }


def list_differences(configs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return {setting: its text in each configuration} of the settings that are not the same in all."""
    keys: dict[str, None] = {}
    for config in configs:
        keys |= dict.fromkeys(config)
    differences = {}
    for key in keys:
        values = [config.get(key, NOT_SET) for config in configs]
        if len(set(values)) > 1:
            differences[key] = values
    return differences


def describe_test_scores(scores: Mapping[str, TaskScores], task: str, metric: str) -> dict[str, str]:
    """Return {label of a view over centres: test score as text}; dashes before a run's test."""
    texts = {}
    for view, view_label in VIEW_LABELS.items():
        text = NOT_SET
        if task in scores:
            score = view_value(scores[task], view, metric)
            text = format_number_or_dash(score.value)
            if score.centre:
                text += f" ({score.centre})"
        texts[f"test {label_metric(metric)} of {task}, {view_label}"] = text
    return texts


def describe_run(ledger: Ledger, run_id: str, history: ScoreHistory) -> dict[str, str]:
    """Return {label: text} of a run's best validation, number of rounds, time and traffic."""
    means = [point.macro for point in history.points if point.macro is not None]
    trained_rounds = [point for point in history.points if point.round > 0]
    seconds = sum(round_row["seconds"] for round_row in ledger.read_rounds(run_id))
    totals = views.centre_totals(ledger, run_id)
    bytes_down = sum(centre["bytes_down"] for centre in totals)
    bytes_up = sum(centre["bytes_up"] for centre in totals)
    return {
        "best mean of centres on validation": format_number_or_dash(max(means, default=None)),
        "rounds": str(len(trained_rounds)),
        "time in rounds": format_duration_or_dash(seconds),
        "sent to the centres, MB": format_number_or_dash(bytes_down / 1e6, 1),
        "received from the centres, MB": format_number_or_dash(bytes_up / 1e6, 1),
    }


def flatten_config(value: Any, prefix: str = "") -> dict[str, str]:
    """Return {"a.b.c": text} of nested settings."""
    if isinstance(value, list):
        return {prefix: ", ".join(map(str, value))}
    if not isinstance(value, Mapping) or not value:
        return {prefix: str(value)}
    flat: dict[str, str] = {}
    for key, child in value.items():
        flat |= flatten_config(child, f"{prefix}.{key}".removeprefix("."))
    return flat
