"""What is to be seen: one function a page. Each reads the ledger; what a page computes is kept until the ledger grows."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse

from common.errors import ConsiliumError
from server import card, export, latest, orders
from server.dashboard import charts, facts, overview
from server.dashboard.app import Console, console
from server.dashboard.live import changes, version
from server.dashboard.render import page
from server.exposition import exposition
from server.figures import NAMES
from server.ledger import Row

router = APIRouter()
MOST = 100  # rounds whose per-centre rows a page reads


def known(shared: Console, run: str) -> Row:
    """Of a cross-validation, its youngest part. Raises ConsiliumError."""
    row = facts.run_of(shared.ledger, run) or next((r for r in reversed(shared.ledger.runs()) if orders.whole(r) == run), None)
    if row is None:
        raise ConsiliumError(f"the ledger knows no run '{run}'")
    return row


def course_of(shared: Console, row: Row) -> dict[str, Any]:
    """facts.course, kept."""
    ledger = shared.ledger
    found: dict[str, Any] = shared.kept.of(("course", row["id"]), version(ledger, row["id"]), lambda: facts.course(ledger, row))
    return found


@router.get("/")
def federation(request: Request) -> Response:
    """Is everything well, who is not and why, how far are we, is the worst centre getting better?"""
    shared = console(request)
    ledger, seen = shared.ledger, version(shared.ledger)
    row = facts.latest(ledger)
    shown: dict[str, Any] = {"seen": seen, "live": "", "row": row}
    if row is None:
        return page(request, "federation.html", shown | overview.nobody(ledger, shared.nodes))
    course = course_of(shared, row)
    figures = charts.course_figures(course)
    found = overview.of(ledger, row, course, shared.nodes, shared.certificates())
    return page(request, "federation.html", shown | found | {"course": course, "names": NAMES}, figures=figures)


@router.get("/runs")
def runs(request: Request) -> Response:
    """All runs, the youngest first; those begun here that are not in the ledger yet."""
    shared = console(request)
    rows = shared.ledger.runs()
    there = {row["id"] for row in rows} | {orders.whole(row) for row in rows}
    begun = [
        {**entry, "fate": shared.launcher.fate(entry["run"])}
        for entry in shared.ledger.audit()
        if entry["what"] == "start" and entry["run"] not in there
    ][-5:]
    rows.sort(key=lambda row: row["created"], reverse=True)
    return page(request, "runs.html", {"rows": rows, "begun": begun, "seen": version(shared.ledger), "live": ""})


@router.get("/runs/{run}")
def one_run(request: Request, run: str) -> Response:
    """Stage and round, the phase of every centre, what is waited for and how long it will take."""
    shared = console(request)
    ledger, row = shared.ledger, known(shared, run)
    now = version(ledger, run)
    at = facts.moment(ledger, row)
    found = {
        "at": at,
        "pace": facts.pace(ledger, row, at),
        "spent": {r["centre"]: r for r in shared.kept.of(("spent", run), now, lambda: latest.totals(ledger, run))},
        "last": {r["centre"]: r for r in latest.closed(ledger, run).get("contributions", [])},
        "events": list(reversed(facts.last_events(ledger, run, 40))),
        "stages": facts.stages_of(row),
        "fate": shared.launcher.fate(orders.whole(row), row["since"]),
    }
    return page(request, "run.html", found | {"row": row, "seen": now, "live": run})


@router.get("/runs/{run}/learning")
def learning(request: Request, run: str) -> Response:
    """Metrics per centre and over centres, the weights that were applied and why, site x model."""
    shared = console(request)
    ledger, row = shared.ledger, known(shared, run)
    now = version(ledger, run)

    def made() -> dict[str, Any]:
        rounds, step = facts.rounds_of(ledger, row, MOST)
        return {"step": step, **charts.learning(ledger, row, rounds)}

    found = shared.kept.of(("learning", run), now, made)
    return page(request, "learning.html", found | {"row": row, "seen": now, "live": run}, figures=found["figures"])


@router.get("/runs/{run}/privacy")
def privacy(request: Request, run: str) -> Response:
    """Epsilon against its limit; what left each centre, by kind and bytes."""
    shared = console(request)
    ledger, row = shared.ledger, known(shared, run)
    now = version(ledger, run)
    found = shared.kept.of(("privacy", run), now, lambda: overview.privacy(ledger, row))
    return page(request, "privacy.html", found | {"row": row, "seen": now, "live": run})


@router.get("/runs/{run}/data")
def data(request: Request, run: str) -> Response:
    """Counts by class and source, and what the centres' scans look like."""
    shared = console(request)
    ledger, row = shared.ledger, known(shared, run)
    found = charts.quality(ledger, row)
    return page(request, "data.html", found | {"row": row, "seen": version(ledger, run), "live": run}, figures=found["figures"])


@router.get("/runs/{run}/evidence")
def evidence(request: Request, run: str) -> Response:
    """Who ordered what, and the files that a run leaves."""
    shared = console(request)
    row, folder = known(shared, run), shared.runs / run
    files = [(name, (folder / name).stat().st_size) for name in FILES if (folder / name).is_file()]
    trail = shared.ledger.audit(orders.whole(row))[::-1]
    made = MADE if (folder / "metrics.json").is_file() else {"scores.csv": MADE["scores.csv"]}
    shown = {"row": row, "seen": version(shared.ledger, run), "live": run, "files": files, "trail": trail, "about": FILES, "made": made}
    return page(request, "evidence.html", shown)


FILES = {
    "report.html": "the report: every table and figure, one file",
    "metrics.json": "all metrics of all rounds, and the test",
    "model.safetensors": "the model's weights; consilium-centre predict reads it",
    "config.yaml": "the configuration, resolved",
}
MADE = {  # when they are asked for
    "model-card.html": "the model card: data, metrics by centre, intended use, limits, privacy, software",
    "model-card.md": "the same as Markdown",
    "scores.csv": "every score, one value a line; what is undefined is empty, with the reason",
    "model.onnx": "the model as ONNX, checked against PyTorch; making it takes a while",
}


@router.get("/runs/{run}/files/{name}")
def file(request: Request, run: str, name: str) -> Response:
    """One of the run's files, to be kept."""
    shared = console(request)
    known(shared, run)
    path = shared.runs / run / name
    saved = {"Content-Disposition": f'attachment; filename="{quote(run)}-{name}"'}
    if name == "scores.csv":
        return Response(export.table(shared.ledger, run), media_type="text/csv", headers=saved)
    if name in ("model-card.html", "model-card.md"):
        markdown = export.model_card(path.parent, shared.ledger)
        html = name.endswith("html")
        return Response(card.page(markdown) if html else markdown, media_type="text/html" if html else "text/markdown", headers=saved)
    if name == "model.onnx" and not path.is_file() and path.parent.is_dir():
        export.onnx(path.parent, path)
    if name not in (*FILES, "model.onnx") or not path.is_file():
        raise ConsiliumError(f"run '{run}' has no {name} (yet)")
    return FileResponse(path, headers=saved)


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """For Prometheus."""
    shared = console(request)
    return Response(exposition(shared.ledger, shared.nodes, shared.certificates()), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/compare")
def compare(request: Request, run: Annotated[list[str] | None, Query()] = None) -> Response:
    """Runs side by side: what differs in their configurations, and in what came of it."""
    shared = console(request)
    chosen = [known(shared, r) for r in dict.fromkeys(run or [])]
    if len(chosen) < 2:
        raise ConsiliumError("choose two runs or more to compare")
    if len(chosen) > 6:
        raise ConsiliumError("choose six runs at most")
    ledger = shared.ledger
    courses = {r["id"]: course_of(shared, r) for r in chosen}
    figures = charts.compared_figures(courses)
    found = overview.compared(ledger, chosen, courses)
    return page(request, "compare.html", found | {"rows": chosen, "seen": "", "live": "", "names": NAMES}, figures=figures)


@router.get("/audit")
def audit(request: Request) -> Response:
    """What people did, the latest first, and whether the chain holds."""
    shared = console(request)
    trail = shared.ledger.audit()
    wrong = orders.broken(trail)
    last = trail[-1]["hash"] if trail else ""
    return page(request, "audit.html", {"trail": trail[::-1][:500], "count": len(trail), "wrong": wrong, "last": last})


@router.get("/live")
async def live(request: Request, seen: str = "", run: str = "") -> StreamingResponse:
    """Server-sent events: the ledger has grown."""
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    return StreamingResponse(changes(request, console(request).ledger, run, seen), media_type="text/event-stream", headers=headers)
