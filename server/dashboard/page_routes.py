"""What people may see: one function a page.

Each reads the ledger. What a page computes is cached until the ledger grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from common.utils.errors import ConsiliumError
from server.dashboard.charts import build_comparison_figures, build_history_figures
from server.dashboard.comparison import comparison_view
from server.dashboard.console import ConsoleContext, get_console
from server.dashboard.data import data_view
from server.dashboard.events import ledger_version, stream_changes
from server.dashboard.learning import learning_view
from server.dashboard.overview import federation_view, no_run_view
from server.dashboard.privacy import privacy_view
from server.dashboard.render import render_page
from server.dashboard.run_files import (
    FILE_DESCRIPTIONS,
    list_generated_files,
    list_saved_files,
    make_download,
)
from server.ledger import views
from server.ledger.audit_trail import first_broken_link
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring import run_history, run_info, run_status
from server.monitoring.prometheus import render_metrics
from server.reporting.labels import label_metric
from server.reporting.ledger_records import index_rows
from server.run.operator_commands import find_root_run_id

router = APIRouter()
MAX_ROUNDS_READ = 60  # rounds whose per-centre rows a page reads
MAX_EVENTS_SHOWN = 40
MAX_PENDING_SHOWN = 5  # launched runs that are not in the ledger
MAX_AUDIT_ENTRIES_SHOWN = 500
MIN_COMPARED_RUNS = 2
MAX_COMPARED_RUNS = 6


class PendingRun(NamedTuple):
    """A run that was started here and is not in the ledger yet."""

    run_id: str
    actor: str
    time: datetime
    error: str  # why it could not start; empty: it is starting


@dataclass(frozen=True)
class RunPage:
    """A page of one run, at the version of the ledger that it shows."""

    console: ConsoleContext
    row: Row
    version: str

    @property
    def run_id(self) -> str:
        """Return the run's id."""
        return str(self.row["id"])

    @property
    def ledger(self) -> Ledger:
        """Return the ledger."""
        return self.console.ledger

    def get_or_compute(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returns, cached under a name until something is written about the run."""
        return self.console.page_cache.get_or_compute((name, self.run_id), self.version, compute)

    def make_context(self, **content: Any) -> dict[str, Any]:
        """Return a template's context: the content, and what every page of a run needs."""
        return content | {"row": self.row, "version": self.version, "live_run": self.run_id}


def open_run_page(request: Request, run_id: str) -> RunPage:
    """Return the page of a run. Raises ConsiliumError where there is no such run."""
    console = get_console(request)
    row = find_run(console, run_id)
    return RunPage(console, row, ledger_version(console.ledger, row["id"]))


def find_run(console: ConsoleContext, run_id: str) -> Row:
    """Return a run, of a cross-validation the latest one. Raises ConsiliumError where there is none."""
    row = console.ledger.read_run(run_id)
    if row:
        return row
    for other_row in reversed(console.ledger.read_runs()):
        if find_root_run_id(other_row) == run_id:
            return other_row
    raise ConsiliumError(f"the ledger has no run '{run_id}'")


def cached_score_history(console: ConsoleContext, row: Row) -> run_history.ScoreHistory:
    """Return a run's scores over its rounds."""
    ledger = console.ledger
    history: run_history.ScoreHistory = console.page_cache.get_or_compute(
        ("history", row["id"]),
        ledger_version(ledger, row["id"]),
        lambda: run_history.score_history(ledger, row),
    )
    return history


# --- all runs


@router.get("/")
def show_federation(request: Request) -> Response:
    """Show the latest run at a glance: what needs attention, progress, the worst centre, every centre."""
    console = get_console(request)
    ledger = console.ledger
    row = run_info.select_latest_run(ledger)
    shared_context = {"version": ledger_version(ledger), "live_run": "", "row": row}
    if row is None:
        context = no_run_view(ledger, console.list_nodes)
        return render_page(request, "federation.html", shared_context | context)
    history = cached_score_history(console, row)
    expiries = console.read_certificate_expiries()
    context = federation_view(ledger, row, history, console.list_nodes, expiries)
    context |= {"task": history.task, "metric": label_metric(history.metric)}
    figures = build_history_figures(history)
    return render_page(request, "federation.html", shared_context | context, figures=figures)


@router.get("/runs")
def show_runs(request: Request) -> Response:
    """Show all runs, the latest first, and runs started here that are not in the ledger yet."""
    console = get_console(request)
    rows = console.ledger.read_runs()
    context = {
        "rows": sorted(rows, key=lambda row: row["created"], reverse=True),
        "pending_runs": list_pending_runs(console, rows)[-MAX_PENDING_SHOWN:],
        "version": ledger_version(console.ledger),
        "live_run": "",
    }
    return render_page(request, "runs.html", context)


def list_pending_runs(console: ConsoleContext, rows: list[Row]) -> list[PendingRun]:
    """Return the runs that an operator started and that are not among the ledger's."""
    ids_in_ledger = {row["id"] for row in rows} | {find_root_run_id(row) for row in rows}
    pending = []
    for entry in console.ledger.read_audit():
        run_id = entry["run_id"]
        if entry["action"] == "start" and run_id not in ids_in_ledger:
            error = console.launcher.exit_message(run_id)
            pending.append(PendingRun(run_id, entry["actor"], entry["time"], error))
    return pending


@router.get("/compare")
def show_comparison(request: Request, run: Annotated[list[str] | None, Query()] = None) -> Response:
    """Show runs side by side: the differences of their configurations, and their outcomes."""
    console = get_console(request)
    rows = [find_run(console, run_id) for run_id in dict.fromkeys(run or [])]
    if not MIN_COMPARED_RUNS <= len(rows) <= MAX_COMPARED_RUNS:
        raise ConsiliumError(
            f"{len(rows)} runs cannot be compared; choose {MIN_COMPARED_RUNS} to {MAX_COMPARED_RUNS} runs"
        )
    histories = {row["id"]: cached_score_history(console, row) for row in rows}
    context = comparison_view(console.ledger, rows, histories) | {"rows": rows}
    figures = build_comparison_figures(histories)
    return render_page(request, "compare.html", context, figures=figures)


@router.get("/audit")
def show_audit_trail(request: Request) -> Response:
    """Show what people did, the latest first, and whether the chain of hashes is intact."""
    entries = get_console(request).ledger.read_audit()
    context = {
        "entries": entries[::-1][:MAX_AUDIT_ENTRIES_SHOWN],
        "num_entries": len(entries),
        "broken_entry": first_broken_link(entries),
        "last_hash": entries[-1]["entry_hash"] if entries else "",
    }
    return render_page(request, "audit.html", context)


# --- one run


@router.get("/runs/{run}")
def show_run(request: Request, run: str) -> Response:
    """Show a run's stage and round, every centre's phase, the time left, and the latest events."""
    page = open_run_page(request, run)
    ledger, row = page.ledger, page.row
    status = run_status.current_status(ledger, row)
    totals = page.get_or_compute("totals", lambda: views.centre_totals(ledger, page.run_id))
    last_round = views.last_round(ledger, page.run_id)
    contributions = last_round.contributions if last_round else []
    events = run_history.load_last_events(ledger, page.run_id, MAX_EVENTS_SHOWN)
    context = page.make_context(
        status=status,
        progress=run_status.estimate_progress(ledger, row, status),
        totals=index_rows(totals, "centre"),
        last_contributions=index_rows(contributions, "centre"),
        events=events[::-1],
        planned_rounds=run_info.planned_rounds_by_stage(row),
        resume_error=page.console.launcher.exit_message(find_root_run_id(row), row["since"]),
    )
    return render_page(request, "run.html", context)


@router.get("/runs/{run}/learning")
def show_learning(request: Request, run: str) -> Response:
    """Show metrics by centre and over centres, the weights and their causes, and cross-site scores."""
    page = open_run_page(request, run)

    def compute_view() -> dict[str, Any]:
        cache = page.console.round_cache
        rounds, step = run_history.load_rounds(page.ledger, page.run_id, MAX_ROUNDS_READ, cache)
        return {"step": step, **learning_view(page.ledger, page.row, rounds)}

    view = page.get_or_compute("learning", compute_view)
    return render_page(request, "learning.html", page.make_context(**view), figures=view["figures"])


@router.get("/runs/{run}/privacy")
def show_privacy(request: Request, run: str) -> Response:
    """Show each centre's epsilon against its limit, and what left it by kind of message."""
    page = open_run_page(request, run)
    view = page.get_or_compute("privacy", lambda: privacy_view(page.ledger, page.row))
    return render_page(request, "privacy.html", page.make_context(**view))


@router.get("/runs/{run}/data")
def show_data(request: Request, run: str) -> Response:
    """Show scans by class and source, and the statistics of the centres' images."""
    page = open_run_page(request, run)
    view = data_view(page.ledger, page.row)
    return render_page(request, "data.html", page.make_context(**view), figures=view["figures"])


@router.get("/runs/{run}/evidence")
def show_evidence(request: Request, run: str) -> Response:
    """Show a run's files and the commands that it was given."""
    page = open_run_page(request, run)
    folder = page.console.runs / run
    context = page.make_context(
        files=list_saved_files(folder),
        descriptions=FILE_DESCRIPTIONS,
        generated_files=list_generated_files(folder),
        entries=page.ledger.read_audit(find_root_run_id(page.row))[::-1],
    )
    return render_page(request, "evidence.html", context)


@router.get("/runs/{run}/files/{name}")
def download_file(request: Request, run: str, name: str) -> Response:
    """Send one of a run's files as a download. Raises ConsiliumError where the run does not have it."""
    console = get_console(request)
    find_run(console, run)
    return make_download(console.ledger, run, console.runs / run, name)


# --- for programs


@router.get("/metrics")
def serve_metrics(request: Request) -> Response:
    """Send the metrics in Prometheus' text format."""
    console = get_console(request)
    text = render_metrics(console.ledger, console.list_nodes, console.read_certificate_expiries())
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/live")
async def stream_events(request: Request, seen: str = "", run: str = "") -> StreamingResponse:
    """Send a server-sent event whenever the ledger has grown beyond the version that a page shows."""
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    events = stream_changes(request, get_console(request).ledger, run, seen)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
