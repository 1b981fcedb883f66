"""What people may do: log in and out, command a run, start and resume runs, manage accounts.

Every command requires a reason and is written to the audit trail.
"""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response

from common.utils.errors import ConsiliumError
from server.dashboard import accounts
from server.dashboard.auth import SessionUser
from server.dashboard.console import ConsoleContext, get_console
from server.dashboard.proxy_trust import Forbidden
from server.dashboard.render import render_page
from server.ledger.reader import Row
from server.monitoring import run_status
from server.run.operator_commands import COMMANDS, Command, find_root_run_id, issue_command

router = APIRouter()
# A path of this console. Browsers take "//host" and "/\\host" for another, and leave out control characters.
LOCAL_PATH = re.compile(r"/(?!/)[!-\[\]-~]*")
MIN_REASON_LENGTH = 3  # characters
MAX_REASON_LENGTH = 500
RESUME_EXPLANATION = (
    "the run continues after its last finished round, with the configuration it was started with"
)


def get_user(request: Request) -> SessionUser:
    """Return who is logged in, as the gate found."""
    user: SessionUser = request.state.person
    return user


def read_form_field(request: Request, name: str) -> str:
    """Return a field of the submitted form, which the gate has read."""
    return str(request.state.form.get(name, "")).strip()


def read_reason(request: Request) -> str:
    """Return the reason. Raises ConsiliumError where there is none."""
    reason = read_form_field(request, "why")
    if len(reason) < MIN_REASON_LENGTH:
        raise ConsiliumError("give a reason: it is kept in the audit trail and in the run's history")
    return reason[:MAX_REASON_LENGTH]


# --- log-in


@router.get("/login")
def show_login_form(request: Request, next_path: Annotated[str, Query(alias="next")] = "/") -> Response:
    """Show the log-in form."""
    return render_page(request, "login.html", {"next": next_path, "sentence": ""})


@router.post("/login")
def log_in(request: Request) -> Response:
    """Begin a session and go where the person wanted to."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Forbidden("this log-in came from another site's page")
    next_path = read_form_field(request, "next")
    password = str(request.state.form.get("password", ""))
    try:
        get_console(request).gate.log_in(request, read_form_field(request, "name"), password)
    except ConsiliumError as error:
        status = 403 if isinstance(error, Forbidden) else 401
        context = {"next": next_path, "sentence": str(error)}
        return render_page(request, "login.html", context, status=status)
    return RedirectResponse(next_path if LOCAL_PATH.fullmatch(next_path) else "/", 303)


@router.post("/logout")
def log_out(request: Request) -> Response:
    """End the session."""
    get_console(request).gate.log_out(request)
    return RedirectResponse("/login", 303)


# --- commands to runs


@router.get("/runs/{run}/order/{what}")
def show_command_form(request: Request, run: str, what: str, centre: str = "") -> Response:
    """Ask for confirmation and a reason."""
    row = get_console(request).ledger.read_run(run)
    if row is None or what not in (*COMMANDS, "resume"):
        raise ConsiliumError("there is no such run, or no such command")
    explanation = RESUME_EXPLANATION if what == "resume" else COMMANDS[Command(what)]
    context = {"row": row, "what": what, "centre": centre, "means": explanation}
    return render_page(request, "order.html", context)


@router.post("/runs/{run}/order/{what}")
def submit_command(request: Request, run: str, what: str) -> Response:
    """Write a command to the ledger, where the run's coordinator reads it; a resume starts a coordinator."""
    console = get_console(request)
    user_name = get_user(request).name
    reason = read_reason(request)
    if what == "resume":
        resume_run(console, user_name, reason, run)
    elif what in COMMANDS:
        centre = read_form_field(request, "centre")
        issue_command(console.ledger, user_name, Command(what), reason, run, centre)
    else:
        raise ConsiliumError(f"'{what}' is not a command")
    return RedirectResponse(f"/runs/{run}", 303)


def resume_run(console: ConsoleContext, user_name: str, reason: str, run_id: str) -> None:
    """Resume a run. Raises ConsiliumError where it cannot be resumed now."""
    row = console.ledger.read_run(run_id)
    if row is None or row["status"] == "finished":
        status = row["status"] if row else "unknown"
        raise ConsiliumError(f"run '{run_id}' is {status}; there is nothing to resume")
    _require_abandoned(console, row)
    root_run_id = find_root_run_id(row)
    console.launcher.resume_run(root_run_id, row["since"])
    console.ledger.log_audit(user_name, "resume", reason, root_run_id)


def _require_abandoned(console: ConsoleContext, row: Row) -> None:
    """Raise ConsiliumError while a coordinator may still be executing the run."""
    status = run_status.current_status(console.ledger, row)
    if not status.is_abandoned:
        raise ConsiliumError(
            f"run '{row['id']}' was active at {status.last_sign:%H:%M:%S} UTC; it can be resumed once it is "
            "paused, or silent beyond its round timeout"
        )


@router.get("/start")
def show_start_form(request: Request, recipe: str = "multisource", overrides: str = "") -> Response:
    """Show the form for a new run: a recipe, overrides, a reason."""
    return _render_start_form(request, recipe, overrides)


@router.post("/start")
def start_run(request: Request) -> Response:
    """Check the settings and start a process; shows the form again with one sentence where it cannot be."""
    console = get_console(request)
    recipe = read_form_field(request, "recipe")
    overrides = read_form_field(request, "overrides")
    try:
        reason = read_reason(request)
        run_id = console.launcher.start_run(recipe, overrides)
    except ConsiliumError as error:
        reason = read_form_field(request, "why")
        return _render_start_form(request, recipe, overrides, reason, str(error))
    detail = f"{reason} [{recipe} {overrides}]".strip()
    console.ledger.log_audit(get_user(request).name, "start", detail, run_id)
    return RedirectResponse("/runs", 303)


def _render_start_form(
    request: Request, recipe: str, overrides: str, reason: str = "", sentence: str = ""
) -> Response:
    recipes = get_console(request).launcher.list_recipes()
    settings = {"recipe": recipe, "overrides": overrides, "why": reason, "sentence": sentence}
    context = {**settings, "recipes": recipes}
    return render_page(request, "start.html", context, status=400 if sentence else 200)


# --- accounts


@router.get("/accounts")
def show_accounts(request: Request) -> Response:
    """Show the accounts; a viewer sees only the form for the own password."""
    return render_accounts(request)


def render_accounts(request: Request, new_account: str = "", password: str = "") -> Response:
    """Render the accounts, with the name and password of a new one."""
    rows = [
        row for row in get_console(request).ledger.read_accounts() if row["role"] != accounts.DISABLED_ROLE
    ]
    return render_page(request, "accounts.html", {"rows": rows, "made": new_account, "password": password})


@router.post("/accounts")
def create_account(request: Request) -> Response:
    """Create an account, or give one a new role and password; the password is shown once."""
    name = read_form_field(request, "name")
    role = read_form_field(request, "role")
    uses_proxy = bool(read_form_field(request, "proxied"))
    ledger = get_console(request).ledger
    password = accounts.create_account(ledger, name, role, get_user(request).name, uses_proxy)
    return render_accounts(request, new_account=name, password=password)


@router.post("/accounts/close")
def disable_account(request: Request) -> Response:
    """Disable an account; its sessions end with their next request."""
    name = read_form_field(request, "name")
    accounts.disable_account(get_console(request).ledger, name, get_user(request).name)
    return RedirectResponse("/accounts", 303)


@router.post("/password")
def change_password(request: Request) -> Response:
    """Change one's own password, and log in with the new one."""
    old_password = str(request.state.form.get("old", ""))
    new_password = str(request.state.form.get("new", ""))
    gate = get_console(request).gate
    gate.change_password(request, get_user(request).name, old_password, new_password)
    return RedirectResponse("/login", 303)
