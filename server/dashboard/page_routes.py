"""What is to be seen: one function a page. Each reads the ledger; what a page computes is kept until the ledger grows."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse

from common.utils.errors import ConsiliumError
from server.dashboard import charts, overview
from server.dashboard.console import ConsoleContext, get_console
from server.dashboard.events import ledger_version, stream_changes
from server.dashboard.render import render_page
from server.ledger import views
from server.ledger.audit_trail import first_broken_link
from server.ledger.reader import Row
from server.monitoring import run_history, run_info, run_status
from server.monitoring.prometheus import render_metrics
from server.reporting import export, model_card
from server.reporting.labels import METRIC_NAMES
from server.run import operator_commands

router = APIRouter()
MAX_ROUNDS_READ = 100  # rounds whose per-centre rows a page reads


def get_run_or_404(console: ConsoleContext, run_id: str) -> Row:
    """Of a cross-validation, its youngest part. Raises ConsiliumError."""
    row = console.ledger.read_run(run_id) or next(
        (r for r in reversed(console.ledger.read_runs()) if operator_commands.find_root_run_id(r) == run_id),
        None,
    )
    if row is None:
        raise ConsiliumError(f"the ledger knows no run '{run_id}'")
    return row


def cached_score_history(console: ConsoleContext, row: Row) -> run_history.ScoreHistory:
    """facts.course, kept."""
    ledger = console.ledger
    found: run_history.ScoreHistory = console.page_cache.get_or_compute(
        ("course", row["id"]),
        ledger_version(ledger, row["id"]),
        lambda: run_history.score_history(ledger, row),
    )
    return found


@router.get("/")
def show_federation(request: Request) -> Response:
    """Is everything well, who is not and why, how far are we, is the worst centre getting better?"""
    shared = get_console(request)
    ledger, seen = shared.ledger, ledger_version(shared.ledger)
    row = run_info.select_latest_run(ledger)
    shown: dict[str, Any] = {"seen": seen, "live": "", "row": row}
    if row is None:
        return render_page(
            request, "federation.html", shown | overview.no_run_view(ledger, shared.list_nodes)
        )
    course = cached_score_history(shared, row)
    figures = charts.build_history_figures(course)
    found = overview.federation_view(
        ledger, row, course, shared.list_nodes, shared.read_certificate_expiries()
    )
    return render_page(
        request, "federation.html", shown | found | {"course": course, "names": METRIC_NAMES}, figures=figures
    )


@router.get("/runs")
def show_runs(request: Request) -> Response:
    """All runs, the youngest first; those begun here that are not in the ledger yet."""
    shared = get_console(request)
    rows = shared.ledger.read_runs()
    there = {row["id"] for row in rows} | {operator_commands.find_root_run_id(row) for row in rows}
    begun = [
        {**entry, "fate": shared.launcher.exit_message(entry["run_id"])}
        for entry in shared.ledger.read_audit()
        if entry["action"] == "start" and entry["run_id"] not in there
    ][-5:]
    rows.sort(key=lambda row: row["created"], reverse=True)
    return render_page(
        request,
        "runs.html",
        {"rows": rows, "begun": begun, "seen": ledger_version(shared.ledger), "live": ""},
    )


@router.get("/runs/{run}")
def show_run(request: Request, run: str) -> Response:
    """Stage and round, the phase of every centre, what is waited for and how long it will take."""
    shared = get_console(request)
    ledger, row = shared.ledger, get_run_or_404(shared, run)
    now = ledger_version(ledger, run)
    at = run_status.current_status(ledger, row)
    closed = views.last_round(ledger, run)
    found = {
        "at": at,
        "pace": run_status.estimate_progress(ledger, row, at),
        "spent": {
            r["centre"]: r
            for r in shared.page_cache.get_or_compute(
                ("spent", run), now, lambda: views.centre_totals(ledger, run)
            )
        },
        "last": {r["centre"]: r for r in (closed.contributions if closed else [])},
        "events": list(reversed(run_history.load_last_events(ledger, run, 40))),
        "stages": run_info.planned_rounds_by_stage(row),
        "fate": shared.launcher.exit_message(operator_commands.find_root_run_id(row), row["since"]),
    }
    return render_page(request, "run.html", found | {"row": row, "seen": now, "live": run})


@router.get("/runs/{run}/learning")
def show_learning(request: Request, run: str) -> Response:
    """Metrics per centre and over centres, the weights that were applied and why, site x model."""
    shared = get_console(request)
    ledger, row = shared.ledger, get_run_or_404(shared, run)
    now = ledger_version(ledger, run)

    def build_view() -> dict[str, Any]:
        rounds, step = run_history.load_rounds(ledger, row["id"], MAX_ROUNDS_READ)
        return {"step": step, **charts.learning_view(ledger, row, rounds)}

    found = shared.page_cache.get_or_compute(("learning", run), now, build_view)
    return render_page(
        request, "learning.html", found | {"row": row, "seen": now, "live": run}, figures=found["figures"]
    )


@router.get("/runs/{run}/privacy")
def show_privacy(request: Request, run: str) -> Response:
    """Epsilon against its limit; what left each centre, by kind and bytes."""
    shared = get_console(request)
    ledger, row = shared.ledger, get_run_or_404(shared, run)
    now = ledger_version(ledger, run)
    found = shared.page_cache.get_or_compute(
        ("privacy", run), now, lambda: overview.privacy_view(ledger, row)
    )
    return render_page(request, "privacy.html", found | {"row": row, "seen": now, "live": run})


@router.get("/runs/{run}/data")
def show_data(request: Request, run: str) -> Response:
    """Counts by class and source, and what the centres' scans look like."""
    shared = get_console(request)
    ledger, row = shared.ledger, get_run_or_404(shared, run)
    found = charts.data_view(ledger, row)
    return render_page(
        request,
        "data.html",
        found | {"row": row, "seen": ledger_version(ledger, run), "live": run},
        figures=found["figures"],
    )


@router.get("/runs/{run}/evidence")
def show_artifacts(request: Request, run: str) -> Response:
    """Who ordered what, and the files that a run leaves."""
    shared = get_console(request)
    row, folder = get_run_or_404(shared, run), shared.runs / run
    files = [(name, (folder / name).stat().st_size) for name in RUN_FILES if (folder / name).is_file()]
    trail = shared.ledger.read_audit(operator_commands.find_root_run_id(row))[::-1]
    made = (
        GENERATED_FILES
        if (folder / "metrics.json").is_file()
        else {"scores.csv": GENERATED_FILES["scores.csv"]}
    )
    shown = {
        "row": row,
        "seen": ledger_version(shared.ledger, run),
        "live": run,
        "files": files,
        "trail": trail,
        "about": RUN_FILES,
        "made": made,
    }
    return render_page(request, "evidence.html", shown)


RUN_FILES = {
    "report.html": "the report: every table and figure, one file",
    "metrics.json": "all metrics of all rounds, and the test",
    "model.safetensors": "the model's weights; consilium-centre predict reads it",
    "config.yaml": "the configuration, resolved",
}
GENERATED_FILES = {  # when they are asked for
    "model-card.html": "the model card: data, metrics by centre, intended use, limits, privacy, software",
    "model-card.md": "the same as Markdown",
    "scores.csv": "every score, one value a line; what is undefined is empty, with the reason",
    "model.onnx": "the model as ONNX, checked against PyTorch; making it takes a while",
}


@router.get("/runs/{run}/files/{name}")
def download_file(request: Request, run: str, name: str) -> Response:
    """One of the run's files, to be kept."""
    shared = get_console(request)
    get_run_or_404(shared, run)
    path = shared.runs / run / name
    saved = {"Content-Disposition": f'attachment; filename="{quote(run)}-{name}"'}
    if name == "scores.csv":
        return Response(export.format_scores_csv(shared.ledger, run), media_type="text/csv", headers=saved)
    if name in ("model-card.html", "model-card.md"):
        markdown = export.make_model_card(path.parent, shared.ledger)
        html = name.endswith("html")
        return Response(
            model_card.render_card_html(markdown) if html else markdown,
            media_type="text/html" if html else "text/markdown",
            headers=saved,
        )
    if name == "model.onnx" and not path.is_file() and path.parent.is_dir():
        export.export_onnx(path.parent, path)
    if name not in (*RUN_FILES, "model.onnx") or not path.is_file():
        raise ConsiliumError(f"run '{run}' has no {name} (yet)")
    return FileResponse(path, headers=saved)


@router.get("/metrics")
def serve_metrics(request: Request) -> Response:
    """For Prometheus."""
    shared = get_console(request)
    return Response(
        render_metrics(shared.ledger, shared.list_nodes, shared.read_certificate_expiries()),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


@router.get("/compare")
def show_comparison(request: Request, run: Annotated[list[str] | None, Query()] = None) -> Response:
    """Runs side by side: what differs in their configurations, and in what came of it."""
    shared = get_console(request)
    chosen = [get_run_or_404(shared, r) for r in dict.fromkeys(run or [])]
    if len(chosen) < 2:
        raise ConsiliumError("choose two runs or more to compare")
    if len(chosen) > 6:
        raise ConsiliumError("choose six runs at most")
    ledger = shared.ledger
    courses = {r["id"]: cached_score_history(shared, r) for r in chosen}
    figures = charts.build_comparison_figures(courses)
    found = overview.comparison_view(ledger, chosen, courses)
    return render_page(
        request,
        "compare.html",
        found | {"rows": chosen, "seen": "", "live": "", "names": METRIC_NAMES},
        figures=figures,
    )


@router.get("/audit")
def show_audit_trail(request: Request) -> Response:
    """What people did, the latest first, and whether the chain holds."""
    shared = get_console(request)
    trail = shared.ledger.read_audit()
    wrong = first_broken_link(trail)
    last = trail[-1]["entry_hash"] if trail else ""
    return render_page(
        request, "audit.html", {"trail": trail[::-1][:500], "count": len(trail), "wrong": wrong, "last": last}
    )


@router.get("/live")
async def stream_events(request: Request, seen: str = "", run: str = "") -> StreamingResponse:
    """Server-sent events: the ledger has grown."""
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    return StreamingResponse(
        stream_changes(request, get_console(request).ledger, run, seen),
        media_type="text/event-stream",
        headers=headers,
    )
