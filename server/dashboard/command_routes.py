"""What people may do: log in and out, order a run about, start and resume runs, make and close accounts. Every order asks for a reason and is
written to the audit trail."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from common.utils.errors import ConsiliumError
from server.dashboard import accounts
from server.dashboard.app import ConsoleContext, get_console
from server.dashboard.auth import Forbidden, SessionUser
from server.dashboard.render import render_page
from server.monitoring import run_status
from server.run import operator_commands

router = APIRouter()


def get_user(request: Request) -> SessionUser:
    """Who is logged in (the gate has seen to it)."""
    found: SessionUser = request.state.person
    return found


def read_form_field(request: Request, name: str) -> str:
    """A field of the form that was sent (the gate has read it)."""
    return str(request.state.form.get(name, "")).strip()


def read_reason(request: Request) -> str:
    """Why; raises ConsiliumError where there is no word about it."""
    why = read_form_field(request, "why")
    if len(why) < 3:
        raise ConsiliumError(
            "give a reason: it stands in the audit trail, and the run's history, for whoever asks later"
        )
    return why[:500]


# ---- coming and going


@router.get("/login")
def show_login_form(request: Request, next: str = "/") -> Response:
    """The form."""
    return render_page(request, "login.html", {"next": next, "sentence": ""})


@router.post("/login")
def log_in(request: Request) -> Response:
    """Begin a session and go where the person wanted to."""
    name, wanted = read_form_field(request, "name"), read_form_field(request, "next")
    password = str(request.state.form.get("password", ""))
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Forbidden("this log-in came from another site's page")
    try:
        get_console(request).gate.log_in(request, name, password)
    except ConsiliumError as error:
        return render_page(
            request,
            "login.html",
            {"next": wanted, "sentence": str(error)},
            status=403 if isinstance(error, Forbidden) else 401,
        )
    return RedirectResponse(wanted if wanted.startswith("/") and wanted[1:2] not in ("/", "\\") else "/", 303)


@router.post("/logout")
def log_out(request: Request) -> Response:
    """End the session."""
    get_console(request).gate.log_out(request)
    return RedirectResponse("/login", 303)


# ---- orders


@router.get("/runs/{run}/order/{what}")
def show_command_form(request: Request, run: str, what: str, centre: str = "") -> Response:
    """Are you sure, and why?"""
    row = run_status.load_run(get_console(request).ledger, run)
    if row is None or what not in (*operator_commands.COMMANDS, "resume"):
        raise ConsiliumError("there is no such run, or no such order")
    means = operator_commands.COMMANDS.get(
        what, "the run goes on after its last finished round, with the configuration it was started with"
    )
    return render_page(request, "order.html", {"row": row, "what": what, "centre": centre, "means": means})


@router.post("/runs/{run}/order/{what}")
def submit_command(request: Request, run: str, what: str) -> Response:
    """Write the order down; the run's coordinator reads it. A resume starts one."""
    shared, who, why, centre = (
        get_console(request),
        get_user(request).name,
        read_reason(request),
        read_form_field(request, "centre"),
    )
    if what == "resume":
        resume_run(shared, who, why, run)
    elif what in operator_commands.COMMANDS:
        operator_commands.issue_command(shared.ledger, who, what, why, run, centre)
    else:
        raise ConsiliumError(f"'{what}' is no order")
    return RedirectResponse(f"/runs/{run}", 303)


def resume_run(console: ConsoleContext, user_name: str, reason: str, run_id: str) -> None:
    """Raises ConsiliumError where the run cannot be resumed now."""
    row = run_status.load_run(console.ledger, run_id)
    if row is None or row["status"] == "finished":
        raise ConsiliumError(
            f"run '{run_id}' is {row['status'] if row else 'unknown'}: there is nothing to resume"
        )
    at = run_status.current_status(console.ledger, row)
    if not at["gone"]:
        raise ConsiliumError(
            f"run '{run_id}' gave a sign of life at {at['last']:%H:%M:%S} UTC; it can be resumed once it is paused, or silent beyond its deadline"
        )
    console.launcher.resume_run(operator_commands.find_root_run_id(row), row["since"])
    console.ledger.log_audit(user_name, "resume", reason, operator_commands.find_root_run_id(row))


@router.get("/start")
def show_start_form(request: Request, recipe: str = "multisource", overrides: str = "") -> Response:
    """A recipe, overrides, a reason."""
    given = {"recipe": recipe, "overrides": overrides, "why": "", "sentence": ""}
    return render_page(
        request, "start.html", given | {"recipes": get_console(request).launcher.list_recipes()}
    )


@router.post("/start")
def start_run(request: Request) -> Response:
    """Check the settings, write it down, start a process; the same form again with one sentence where it cannot be."""
    shared = get_console(request)
    recipe, overrides = read_form_field(request, "recipe"), read_form_field(request, "overrides")
    try:
        why = read_reason(request)
        run = shared.launcher.start_run(recipe, overrides)
    except ConsiliumError as error:
        given = {
            "recipe": recipe,
            "overrides": overrides,
            "why": read_form_field(request, "why"),
            "sentence": str(error),
        }
        return render_page(
            request, "start.html", given | {"recipes": shared.launcher.list_recipes()}, status=400
        )
    shared.ledger.log_audit(get_user(request).name, "start", f"{why} [{recipe} {overrides}]".strip(), run)
    return RedirectResponse("/runs", 303)


# ---- accounts


@router.get("/accounts")
def show_accounts(request: Request) -> Response:
    """Who may come in; a viewer sees only the own password's form."""
    return render_accounts(request)


def render_accounts(request: Request, new_account: str = "", password: str = "") -> Response:
    """The page; `made`: an account that is new, and its password."""
    rows = [
        row for row in get_console(request).ledger.read_accounts() if row["role"] != accounts.DISABLED_ROLE
    ]
    return render_page(request, "accounts.html", {"rows": rows, "made": new_account, "password": password})


@router.post("/accounts")
def create_account(request: Request) -> Response:
    """A new account, or a new role and password; the password is shown once."""
    name, role = read_form_field(request, "name"), read_form_field(request, "role")
    proxied = bool(read_form_field(request, "proxied"))
    password = accounts.create_account(
        get_console(request).ledger, name, role, get_user(request).name, proxied
    )
    return render_accounts(request, new_account=name, password=password)


@router.post("/accounts/close")
def disable_account(request: Request) -> Response:
    """No way in any more; sessions of that account end with their next request."""
    accounts.disable_account(
        get_console(request).ledger, read_form_field(request, "name"), get_user(request).name
    )
    return RedirectResponse("/accounts", 303)


@router.post("/password")
def change_password(request: Request) -> Response:
    """One's own."""
    old, new = (str(request.state.form.get(key, "")) for key in ("old", "new"))
    accounts.change_password(get_console(request).ledger, get_user(request).name, old, new)
    return RedirectResponse("/login", 303)  # by its new password
