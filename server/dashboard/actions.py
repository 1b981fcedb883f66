"""What people may do: log in and out, order a run about, start and resume runs, make and close accounts. Every order asks for a reason and is
written to the audit trail."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from common.errors import ConsiliumError
from server import accounts, orders
from server.dashboard import facts
from server.dashboard.access import Forbidden, Person
from server.dashboard.app import Console, console
from server.dashboard.render import page

router = APIRouter()


def person(request: Request) -> Person:
    """Who is logged in (the gate has seen to it)."""
    found: Person = request.state.person
    return found


def field(request: Request, name: str) -> str:
    """A field of the form that was sent (the gate has read it)."""
    return str(request.state.form.get(name, "")).strip()


def reason(request: Request) -> str:
    """Why; raises ConsiliumError where there is no word about it."""
    why = field(request, "why")
    if len(why) < 3:
        raise ConsiliumError("give a reason: it stands in the audit trail, and the run's history, for whoever asks later")
    return why[:500]


# ---- coming and going


@router.get("/login")
def ask_in(request: Request, next: str = "/") -> Response:
    """The form."""
    return page(request, "login.html", {"next": next, "sentence": ""})


@router.post("/login")
def log_in(request: Request) -> Response:
    """Begin a session and go where the person wanted to."""
    name, wanted = field(request, "name"), field(request, "next")
    password = str(request.state.form.get("password", ""))
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Forbidden("this log-in came from another site's page")
    try:
        console(request).gate.log_in(request, name, password)
    except ConsiliumError as error:
        return page(request, "login.html", {"next": wanted, "sentence": str(error)}, status=403 if isinstance(error, Forbidden) else 401)
    return RedirectResponse(wanted if wanted.startswith("/") and wanted[1:2] not in ("/", "\\") else "/", 303)


@router.post("/logout")
def log_out(request: Request) -> Response:
    """End the session."""
    console(request).gate.log_out(request)
    return RedirectResponse("/login", 303)


# ---- orders


@router.get("/runs/{run}/order/{what}")
def ask_order(request: Request, run: str, what: str, centre: str = "") -> Response:
    """Are you sure, and why?"""
    row = facts.run_of(console(request).ledger, run)
    if row is None or what not in (*orders.ORDERS, "resume"):
        raise ConsiliumError("there is no such run, or no such order")
    means = orders.ORDERS.get(what, "the run goes on after its last finished round, with the configuration it was started with")
    return page(request, "order.html", {"row": row, "what": what, "centre": centre, "means": means})


@router.post("/runs/{run}/order/{what}")
def order(request: Request, run: str, what: str) -> Response:
    """Write the order down; the run's coordinator reads it. A resume starts one."""
    shared, who, why, centre = console(request), person(request).name, reason(request), field(request, "centre")
    if what == "resume":
        resume(shared, who, why, run)
    elif what in orders.ORDERS:
        orders.give(shared.ledger, who, what, why, run, centre)
    else:
        raise ConsiliumError(f"'{what}' is no order")
    return RedirectResponse(f"/runs/{run}", 303)


def resume(shared: Console, who: str, why: str, run: str) -> None:
    """Raises ConsiliumError where the run cannot be resumed now."""
    row = facts.run_of(shared.ledger, run)
    if row is None or row["status"] == "finished":
        raise ConsiliumError(f"run '{run}' is {row['status'] if row else 'unknown'}: there is nothing to resume")
    at = facts.moment(shared.ledger, row)
    if not at["gone"]:
        raise ConsiliumError(
            f"run '{run}' gave a sign of life at {at['last']:%H:%M:%S} UTC; it can be resumed once it is paused, or silent beyond its deadline"
        )
    shared.launcher.resume(orders.whole(row), row["since"])
    shared.ledger.note(who, "resume", why, orders.whole(row))


@router.get("/start")
def ask_start(request: Request, recipe: str = "multisource", overrides: str = "") -> Response:
    """A recipe, overrides, a reason."""
    given = {"recipe": recipe, "overrides": overrides, "why": "", "sentence": ""}
    return page(request, "start.html", given | {"recipes": console(request).launcher.recipes()})


@router.post("/start")
def start(request: Request) -> Response:
    """Check the settings, write it down, start a process; the same form again with one sentence where it cannot be."""
    shared = console(request)
    recipe, overrides = field(request, "recipe"), field(request, "overrides")
    try:
        why = reason(request)
        run = shared.launcher.start(recipe, overrides)
    except ConsiliumError as error:
        given = {"recipe": recipe, "overrides": overrides, "why": field(request, "why"), "sentence": str(error)}
        return page(request, "start.html", given | {"recipes": shared.launcher.recipes()}, status=400)
    shared.ledger.note(person(request).name, "start", f"{why} [{recipe} {overrides}]".strip(), run)
    return RedirectResponse("/runs", 303)


# ---- accounts


@router.get("/accounts")
def list_accounts(request: Request) -> Response:
    """Who may come in; a viewer sees only the own password's form."""
    return with_accounts(request)


def with_accounts(request: Request, made: str = "", password: str = "") -> Response:
    """The page; `made`: an account that is new, and its password."""
    rows = [row for row in console(request).ledger.accounts() if row["role"] != accounts.CLOSED]
    return page(request, "accounts.html", {"rows": rows, "made": made, "password": password})


@router.post("/accounts")
def make_account(request: Request) -> Response:
    """A new account, or a new role and password; the password is shown once."""
    name, role = field(request, "name"), field(request, "role")
    proxied = bool(field(request, "proxied"))
    password = accounts.give(console(request).ledger, name, role, person(request).name, proxied)
    return with_accounts(request, made=name, password=password)


@router.post("/accounts/close")
def close_account(request: Request) -> Response:
    """No way in any more; sessions of that account end with their next request."""
    accounts.close(console(request).ledger, field(request, "name"), person(request).name)
    return RedirectResponse("/accounts", 303)


@router.post("/password")
def change_password(request: Request) -> Response:
    """One's own."""
    old, new = (str(request.state.form.get(key, "")) for key in ("old", "new"))
    accounts.change(console(request).ledger, person(request).name, old, new)
    return RedirectResponse("/login", 303)  # by its new password
