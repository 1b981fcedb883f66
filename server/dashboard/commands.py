"""The console's commands of `consilium-server`: serve it, and manage its accounts."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from common.utils.errors import ConsiliumError
from server.command_options import AuthorityOption, LedgerOption, RunsOption
from server.rounds.run_lifecycle import open_ledger, resolve_runs_dir


def dashboard(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: int = 8080,
    runs: RunsOption = "",
    ledger: LedgerOption = "",
    certificate: Annotated[Path | None, typer.Option(help="TLS certificate; with --key")] = None,
    key: Annotated[Path | None, typer.Option(help="its private key")] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(help="address or network of a reverse proxy that speaks TLS to the browsers"),
    ] = None,
    trust_header: Annotated[
        str, typer.Option(help="header in which the proxy names the user, e.g. X-Forwarded-User")
    ] = "",
    metrics_from: Annotated[
        list[str] | None,
        typer.Option(help="addresses that may read /metrics without a log-in; by default this machine"),
    ] = None,
    superlink: Annotated[
        str,
        typer.Option(help="deployed: the SuperLink, host:port, where runs are started; empty: simulation"),
    ] = "",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """Serve the operator's console: centres, runs, learning, privacy, commands, audit trail."""
    from server.dashboard.serve import ConsoleOptions, serve_console

    options = ConsoleOptions(
        runs=resolve_runs_dir(runs),
        ledger_address=ledger,
        host=host,
        port=port,
        certificate=certificate,
        key=key,
        proxies=proxy or [],
        user_header=trust_header,
        scrapers=metrics_from or ["127.0.0.1", "::1"],
        superlink=superlink,
        ca=ca,
    )
    serve_console(options)


def account(
    action: Annotated[str, typer.Argument(metavar="ACTION", help="add | close | list")],
    name: Annotated[str, typer.Argument()] = "",
    role: Annotated[str, typer.Option(help="viewer | operator")] = "viewer",
    by_proxy: Annotated[
        bool, typer.Option("--by-proxy", help="without a password: the trusted reverse proxy authenticates")
    ] = False,
    runs: RunsOption = "",
    ledger: LedgerOption = "",
) -> None:
    """Manage who may use the console. A new account's password is random and printed once."""
    from server.dashboard import accounts

    run_ledger = open_ledger(resolve_runs_dir(runs), ledger)
    actor = f"{getpass.getuser()} at the coordinator"
    if action == "add":
        password = accounts.create_account(run_ledger, name, role, actor, by_proxy)
        typer.echo(f"{name}, {role}: password {password}" if password else f"{name}, {role}, by the proxy")
    elif action == "close":
        accounts.disable_account(run_ledger, name, actor)
    elif action == "list":
        for row in run_ledger.read_accounts():
            typer.echo(f"{row['name']}  {row['role']}")
    else:
        raise ConsiliumError(f"account {action}: use add, close or list")
