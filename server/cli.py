"""`consilium-server`: the coordinator's command."""

from __future__ import annotations

import contextlib
import getpass
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.table import Table

from common.cli import run, say
from common.compose import compose, to_dict
from common.errors import ConsiliumError, nearest
from common.findings import show
from server import report as reports
from server.health import Node
from server.runs import find, open_ledger, runs_folder
from server.simulate import console
from server.simulate import simulate as simulate_run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="The coordinator: simulate, resume, compare, report, runs, show, watch, dashboard, account, export, metrics, backup, restore, provision, "
    "admit, run, doctor.",
)
Id = Annotated[str, typer.Option("--id", help="the new run's id; empty: made from the time and the recipe")]
Runs = Annotated[str, typer.Option("--runs", help="folder of results; empty: $CONSILIUM_RUNS or ./runs")]


@app.command()
def simulate(
    overrides: Annotated[list[str] | None, typer.Argument(help="e.g. stage.rounds=2 aggregation.tau=1")] = None,
    recipe: str = "multisource",
    runs: Runs = "",
    gpus: Annotated[float, typer.Option(help="share of a GPU for each centre")] = 0.0,
    id: Id = "",
) -> None:
    """Run a recipe in Flower's simulation on this machine."""
    simulate_run(recipe, _split(overrides), runs, gpus=gpus, run=id)


@app.command()
def resume(run_id: Annotated[str, typer.Argument(metavar="RUN")], runs: Runs = "", gpus: float = 0.0) -> None:
    """Go on with an interrupted or paused simulation (a deployed run: `run --resume RUN`)."""
    simulate_run("", [], runs, resume=run_id, gpus=gpus)


@app.command()
def compare(overrides: Annotated[list[str] | None, typer.Argument()] = None, recipe: str = "multisource", runs: Runs = "") -> None:
    """Federated, central and local side by side, with equal numbers of optimiser steps."""
    results = {}
    for mode in ("federated", "central", "local"):
        folder = simulate_run(recipe, [*_split(overrides), f"federation.mode={mode}"], runs)
        results[mode] = json.loads((folder / "metrics.json").read_text())
    console.print(reports.side_by_side(results))


@app.command()
def report(run_id: Annotated[str, typer.Argument(metavar="RUN")] = "latest", runs: Runs = "") -> None:
    """Write a run's report.html again and print its table."""
    folder = find(runs_folder(runs), run_id)
    result = json.loads((folder / "metrics.json").read_text())
    reports.write_report(folder / "report.html", result)
    console.print(reports.table(result))
    say(console, f"report: {folder / 'report.html'}")


@app.command("runs")
def list_runs(runs: Runs = "", ledger: str = "") -> None:
    """All runs in the ledger with their status."""
    folder = runs_folder(runs)
    shown = Table("run", "recipe", "mode", "status", "since")
    for row in open_ledger(folder, ledger).runs():
        shown.add_row(row["id"], row["recipe"], row["mode"], row["status"], f"{row['since']:%Y-%m-%d %H:%M:%S}")
    console.print(shown)


SuperLink = Annotated[str, typer.Option(envvar="CONSILIUM_SUPERLINK", help="its address, host:port")]
Authority = Annotated[Path, typer.Option("--ca", envvar="CONSILIUM_CA", help="ca.crt of the federation")]
Deployed = Annotated[
    str, typer.Option("--superlink", envvar="CONSILIUM_SUPERLINK", help="who is connected, by the SuperLink; empty: a simulation")
]
Named = Annotated[str, typer.Argument(metavar="RUN", help="a run's id; `latest`: the youngest that goes on, else the youngest")]


@app.command("show")
def show_run(run_id: Named = "latest", runs: Runs = "", ledger: str = "", superlink: Deployed = "", ca: Authority = Path("ca.crt")) -> None:
    """How a run is at this moment: stage, round, every centre with its state and numbers, the last events."""
    from server import terminal

    book, ask = open_ledger(runs_folder(runs), ledger), _nodes(superlink, ca)
    console.print(terminal.show(book, terminal.run_named(book, run_id), ask() if ask else None))


@app.command("watch")
def watch_run(
    run_id: Named = "latest", runs: Runs = "", ledger: str = "", superlink: Deployed = "", ca: Authority = Path("ca.crt")
) -> None:
    """`show`, live, until the run ends or waits for a person. Ctrl-C leaves the run alone."""
    from server import terminal

    book = open_ledger(runs_folder(runs), ledger)
    with contextlib.suppress(KeyboardInterrupt):
        terminal.watch(book, terminal.run_named(book, run_id)["id"], _nodes(superlink, ca), console)


def _nodes(superlink: str, ca: Path) -> Callable[[], list[Node]] | None:
    from server.deployed import nodes

    return (lambda: nodes(superlink, ca)) if superlink else None


@app.command()
def metrics(runs: Runs = "", ledger: str = "", superlink: Deployed = "", ca: Authority = Path("ca.crt")) -> None:
    """Print what the dashboard's /metrics shows to Prometheus, for a coordinator without one: for node_exporter's textfile collector."""
    from server.deployed import certificates
    from server.exposition import exposition

    known = certificates(superlink, ca) if superlink else {}
    typer.echo(exposition(open_ledger(runs_folder(runs), ledger), _nodes(superlink, ca), known).decode(), nl=False)


@app.command("export")
def export_run(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    to: Annotated[str, typer.Option(help="safetensors | onnx | csv | card | tensorboard")],
    out: Annotated[
        str, typer.Option(help="the file to write (card: .md or .html); a folder for tensorboard; empty: in the run's folder, or here")
    ] = "",
    runs: Runs = "",
    ledger: str = "",
) -> None:
    """A run for others' hands: its weights, an ONNX file checked against PyTorch, its scores as a table, its model card, its curves."""
    from server import export

    folder = find(runs_folder(runs), run_id)
    book = open_ledger(runs_folder(runs), ledger)
    if to not in export.FORMATS:
        raise ConsiliumError(f"--to {to} is no format{nearest(to, export.FORMATS)}")
    typer.echo(export.FORMATS[to](folder, book, out))


@app.command()
def backup(file: Annotated[Path, typer.Argument(help="a tar; -: standard output")], runs: Runs = "", ledger: str = "") -> None:
    """Write all runs and the ledger to one file; runs may be on meanwhile."""
    from server import backup as backups

    folder = runs_folder(runs)
    for sentence in backups.backup(file, folder, open_ledger(folder, ledger)):
        typer.echo(sentence, err=True)


@app.command()
def restore(file: Annotated[Path, typer.Argument(help="what backup wrote; -: standard input")], runs: Runs = "", ledger: str = "") -> None:
    """Put what `backup` wrote into an empty folder and a new ledger; its runs can be resumed there."""
    from server import backup as backups

    folder = runs_folder(runs)
    for sentence in backups.restore(file, folder, open_ledger(folder, ledger)):
        typer.echo(sentence, err=True)


@app.command()
def config(overrides: Annotated[list[str] | None, typer.Argument()] = None, recipe: str = "multisource") -> None:
    """Print the resolved configuration without running anything."""
    typer.echo(yaml.safe_dump(to_dict(compose([f"recipe={recipe}", *_split(overrides)])), sort_keys=False), nl=False)


@app.command()
def provision(
    federation: Annotated[Path, typer.Argument(help="federation.yaml (server/federation.py has its keys)")],
    out: Annotated[Path, typer.Option(help="folder for the authority, the coordinator's files and the kits")] = Path("federation"),
    revoke: Annotated[str, typer.Option(metavar="CENTRE", help="let this centre in no more")] = "",
    reissue: Annotated[
        str, typer.Option(metavar="CENTRE", help="a new key for this centre, or a new certificate for the 'coordinator'")
    ] = "",
    check: Annotated[bool, typer.Option("--check", help="only say what is there, what expires and what does not fit")] = False,
) -> None:
    """Make certificates, keys, secrets and one archive per hospital, offline. What is there is kept."""
    from server import provision as provisioning

    if check:
        show(provisioning.check(federation, out))
    elif revoke:
        typer.echo(provisioning.revoke(out, revoke))
    else:
        for sentence in provisioning.provision(federation, out, reissue):
            typer.echo(sentence)


@app.command()
def admit(
    centres: Annotated[Path, typer.Argument(help="folder of the centres' public keys")] = Path("/etc/centres"),
    superlink: SuperLink = "localhost:8000",
    ca: Authority = Path("ca.crt"),
) -> None:
    """Let the SuperLink know exactly the centres whose public keys lie in CENTRES: new ones are let in, revoked ones no more."""
    from server.deployed import admit as let_in

    changes = list(let_in(centres, superlink, ca))
    typer.echo("\n".join(changes) or "nothing to change")


@app.command()
def doctor(
    public: Annotated[str, typer.Option(help="the address that hospitals reach, host:port; checks also what they can see there")] = "",
    centres: Annotated[Path, typer.Option(help="folder of the centres' public keys")] = Path("/etc/centres"),
    runs: Runs = "",
    superlink: SuperLink = "localhost:8000",
    ca: Authority = Path("ca.crt"),
) -> None:
    """Check all that a run needs and say what to do: SuperLink, proxy, certificates, centres, ledger, disk. Exit status 1 for a fault."""
    from server.doctor import examine

    show(examine(superlink, ca, centres, runs_folder(runs), public))


@app.command("run")
def run_deployed(
    overrides: Annotated[list[str] | None, typer.Argument(help="e.g. federation=folder federation.centres=[north,south]")] = None,
    recipe: str = "multisource",
    runs: Runs = "",
    resume: Annotated[str, typer.Option(metavar="RUN", help="go on with this run")] = "",
    superlink: SuperLink = "localhost:8000",
    ca: Authority = Path("ca.crt"),
    id: Id = "",
) -> None:
    """Run a recipe on the federation's hospitals and follow it."""
    from server.deployed import run as start

    start(recipe, _split(overrides), superlink, ca, runs, resume, id)


@app.command()
def dashboard(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: int = 8080,
    runs: Runs = "",
    ledger: Annotated[str, typer.Option(help="a database address; empty: $CONSILIUM_LEDGER, or SQLite in the runs folder")] = "",
    certificate: Annotated[Path | None, typer.Option(help="TLS certificate; with --key")] = None,
    key: Annotated[Path | None, typer.Option(help="its private key")] = None,
    proxy: Annotated[list[str] | None, typer.Option(help="address or network of a reverse proxy that speaks TLS to the browsers")] = None,
    trust_header: Annotated[str, typer.Option(help="header by which the proxy names who has logged in, e.g. X-Forwarded-User")] = "",
    metrics_from: Annotated[
        list[str] | None, typer.Option(help="addresses that may read /metrics without logging in; else this machine")
    ] = None,
    superlink: Annotated[str, typer.Option(help="deployed: the SuperLink, host:port, at which runs are started; empty: simulation")] = "",
    ca: Authority = Path("ca.crt"),
) -> None:
    """The operator's console, a web page: centres, runs, learning, privacy, orders, audit trail. Accounts: `account add`."""
    from server.dashboard.serve import serve

    serve(
        host,
        port,
        runs_folder(runs),
        ledger,
        certificate,
        key,
        proxy or [],
        trust_header,
        metrics_from or ["127.0.0.1", "::1"],
        superlink,
        ca,
    )


@app.command()
def account(
    what: Annotated[str, typer.Argument(help="add | close | list")],
    name: Annotated[str, typer.Argument()] = "",
    role: Annotated[str, typer.Option(help="viewer | operator")] = "viewer",
    by_proxy: Annotated[bool, typer.Option("--by-proxy", help="no password here: the trusted reverse proxy asks for it")] = False,
    runs: Runs = "",
    ledger: str = "",
) -> None:
    """Who may use the console. A new account's password is made at random and printed once."""
    from server import accounts

    book = open_ledger(runs_folder(runs), ledger)
    by = f"{getpass.getuser()} at the coordinator"
    if what == "add":
        password = accounts.give(book, name, role, by, by_proxy)
        typer.echo(f"{name}, {role}" + (f": password {password}" if password else ", by the proxy"))
    elif what == "close":
        accounts.close(book, name, by)
    elif what == "list":
        for row in book.accounts():
            typer.echo(f"{row['name']}  {row['role']}")
    else:
        raise ConsiliumError(f"account {what}: give add, close or list")


def _split(overrides: list[str] | None) -> list[str]:
    """Overrides as separate arguments or as one quoted text, as make passes them."""
    return [part for text in overrides or [] for part in shlex.split(text)]


def main() -> None:
    """The command's entry point."""
    run(app)
