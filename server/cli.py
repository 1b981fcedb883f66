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

from common.config.compose import compose_config, config_to_dict
from common.utils.checks import print_results
from common.utils.cli_main import print_plain, run_app
from common.utils.errors import ConsiliumError, suggest
from server.monitoring.health import SuperLinkNode
from server.operations.simulation import rich_console
from server.operations.simulation import run_simulation as simulate_run
from server.reporting import report as reports
from server.rounds.run_lifecycle import find_run_dir, open_ledger, resolve_runs_dir

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="The coordinator: simulate, resume, compare, report, runs, show, watch, dashboard, account, export, metrics, backup, restore, provision, "
    "admit, run, doctor.",
)
RunIdOption = Annotated[
    str, typer.Option("--id", help="the new run's id; empty: made from the time and the recipe")
]
RunsOption = Annotated[
    str, typer.Option("--runs", help="folder of results; empty: $CONSILIUM_RUNS or ./runs")
]


@app.command()
def simulate(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="e.g. stage.rounds=2 aggregation.tau=1")
    ] = None,
    recipe: str = "multisource",
    runs: RunsOption = "",
    gpus: Annotated[float, typer.Option(help="share of a GPU for each centre")] = 0.0,
    run_id: RunIdOption = "",
) -> None:
    """Run a recipe in Flower's simulation on this machine."""
    simulate_run(recipe, _split_overrides(overrides), runs, gpus=gpus, run_id=run_id)


@app.command()
def resume(
    run_id: Annotated[str, typer.Argument(metavar="RUN")], runs: RunsOption = "", gpus: float = 0.0
) -> None:
    """Go on with an interrupted or paused simulation (a deployed run: `run --resume RUN`)."""
    simulate_run("", [], runs, resume_id=run_id, gpus=gpus)


@app.command()
def compare(
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    recipe: str = "multisource",
    runs: RunsOption = "",
) -> None:
    """Federated, central and local side by side, with equal numbers of optimiser steps."""
    results = {}
    for mode in ("federated", "central", "local"):
        folder = simulate_run(recipe, [*_split_overrides(overrides), f"federation.mode={mode}"], runs)
        results[mode] = json.loads((folder / "metrics.json").read_text())
    rich_console.print(reports.build_comparison_table(results))


@app.command()
def report(run_id: Annotated[str, typer.Argument(metavar="RUN")] = "latest", runs: RunsOption = "") -> None:
    """Write a run's report.html again and print its table."""
    folder = find_run_dir(resolve_runs_dir(runs), run_id)
    result = json.loads((folder / "metrics.json").read_text())
    reports.write_report(folder / "report.html", result)
    rich_console.print(reports.build_result_table(result))
    print_plain(rich_console, f"report: {folder / 'report.html'}")


@app.command("runs")
def list_runs(runs: RunsOption = "", ledger: str = "") -> None:
    """All runs in the ledger with their status."""
    folder = resolve_runs_dir(runs)
    shown = Table("run", "recipe", "mode", "status", "since")
    for row in open_ledger(folder, ledger).read_runs():
        shown.add_row(
            row["id"], row["recipe"], row["mode"], row["status"], f"{row['since']:%Y-%m-%d %H:%M:%S}"
        )
    rich_console.print(shown)


SuperLinkOption = Annotated[str, typer.Option(envvar="CONSILIUM_SUPERLINK", help="its address, host:port")]
AuthorityOption = Annotated[
    Path, typer.Option("--ca", envvar="CONSILIUM_CA", help="ca.crt of the federation")
]
OptionalSuperLink = Annotated[
    str,
    typer.Option(
        "--superlink",
        envvar="CONSILIUM_SUPERLINK",
        help="who is connected, by the SuperLink; empty: a simulation",
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="a run's id; `latest`: the youngest that goes on, else the youngest"),
]


@app.command("show")
def show_run(
    run_id: RunArgument = "latest",
    runs: RunsOption = "",
    ledger: str = "",
    superlink: OptionalSuperLink = "",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """How a run is at this moment: stage, round, every centre with its state and numbers, the last events."""
    from server.monitoring import terminal

    book, ask = open_ledger(resolve_runs_dir(runs), ledger), _make_node_lister(superlink, ca)
    rich_console.print(
        terminal.render_status(book, terminal.resolve_run(book, run_id), ask() if ask else None)
    )


@app.command("watch")
def watch_run(
    run_id: RunArgument = "latest",
    runs: RunsOption = "",
    ledger: str = "",
    superlink: OptionalSuperLink = "",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """`show`, live, until the run ends or waits for a person. Ctrl-C leaves the run alone."""
    from server.monitoring import terminal

    book = open_ledger(resolve_runs_dir(runs), ledger)
    with contextlib.suppress(KeyboardInterrupt):
        terminal.watch_status(
            book, terminal.resolve_run(book, run_id)["id"], _make_node_lister(superlink, ca), rich_console
        )


def _make_node_lister(superlink: str, ca: Path) -> Callable[[], list[SuperLinkNode]] | None:
    from server.operations.superlink import list_nodes

    return (lambda: list_nodes(superlink, ca)) if superlink else None


@app.command()
def metrics(
    runs: RunsOption = "",
    ledger: str = "",
    superlink: OptionalSuperLink = "",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """Print what the dashboard's /metrics shows to Prometheus, for a coordinator without one: for node_exporter's textfile collector."""
    from server.monitoring.prometheus import render_metrics
    from server.operations.superlink import read_certificate_expiries

    known = read_certificate_expiries(superlink, ca) if superlink else {}
    typer.echo(
        render_metrics(
            open_ledger(resolve_runs_dir(runs), ledger), _make_node_lister(superlink, ca), known
        ).decode(),
        nl=False,
    )


@app.command("export")
def export_run(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    to: Annotated[str, typer.Option(help="safetensors | onnx | csv | card | tensorboard")],
    out: Annotated[
        str,
        typer.Option(
            help="the file to write (card: .md or .html); a folder for tensorboard; empty: in the run's folder, or here"
        ),
    ] = "",
    runs: RunsOption = "",
    ledger: str = "",
) -> None:
    """A run for others' hands: its weights, an ONNX file checked against PyTorch, its scores as a table, its model card, its curves."""
    from server.reporting import export

    folder = find_run_dir(resolve_runs_dir(runs), run_id)
    book = open_ledger(resolve_runs_dir(runs), ledger)
    if to not in export.EXPORTERS:
        raise ConsiliumError(f"--to {to} is no format{suggest(to, export.EXPORTERS)}")
    typer.echo(export.EXPORTERS[to](folder, book, out))


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="a tar; -: standard output")],
    runs: RunsOption = "",
    ledger: str = "",
) -> None:
    """Write all runs and the ledger to one file; runs may be on meanwhile."""
    from server.operations import backup as backups

    folder = resolve_runs_dir(runs)
    for sentence in backups.write_backup(file, folder, open_ledger(folder, ledger)):
        typer.echo(sentence, err=True)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="what backup wrote; -: standard input")],
    runs: RunsOption = "",
    ledger: str = "",
) -> None:
    """Put what `backup` wrote into an empty folder and a new ledger; its runs can be resumed there."""
    from server.operations import backup as backups

    folder = resolve_runs_dir(runs)
    for sentence in backups.restore_backup(file, folder, open_ledger(folder, ledger)):
        typer.echo(sentence, err=True)


@app.command()
def config(
    overrides: Annotated[list[str] | None, typer.Argument()] = None, recipe: str = "multisource"
) -> None:
    """Print the resolved configuration without running anything."""
    typer.echo(
        yaml.safe_dump(
            config_to_dict(compose_config([f"recipe={recipe}", *_split_overrides(overrides)])),
            sort_keys=False,
        ),
        nl=False,
    )


@app.command()
def provision(
    federation: Annotated[
        Path, typer.Argument(help="federation.yaml (server/operations/federation_file.py has its keys)")
    ],
    out: Annotated[
        Path, typer.Option(help="folder for the authority, the coordinator's files and the kits")
    ] = Path("federation"),
    revoke: Annotated[str, typer.Option(metavar="CENTRE", help="let this centre in no more")] = "",
    reissue: Annotated[
        str,
        typer.Option(
            metavar="CENTRE", help="a new key for this centre, or a new certificate for the 'coordinator'"
        ),
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="only say what is there, what expires and what does not fit")
    ] = False,
) -> None:
    """Make certificates, keys, secrets and one archive per hospital, offline. What is there is kept."""
    from server.operations import provision as provisioning

    if check:
        print_results(provisioning.check_provisioning(federation, out))
    elif revoke:
        typer.echo(provisioning.revoke_centre(out, revoke))
    else:
        for sentence in provisioning.provision_federation(federation, out, reissue):
            typer.echo(sentence)


@app.command()
def admit(
    centres: Annotated[Path, typer.Argument(help="folder of the centres' public keys")] = Path(
        "/etc/centres"
    ),
    superlink: SuperLinkOption = "localhost:8000",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """Let the SuperLink know exactly the centres whose public keys lie in CENTRES: new ones are let in, revoked ones no more."""
    from server.operations.superlink import sync_nodes as let_in

    changes = list(let_in(centres, superlink, ca))
    typer.echo("\n".join(changes) or "nothing to change")


@app.command()
def doctor(
    public: Annotated[
        str,
        typer.Option(help="the address that hospitals reach, host:port; checks also what they can see there"),
    ] = "",
    centres: Annotated[Path, typer.Option(help="folder of the centres' public keys")] = Path("/etc/centres"),
    runs: RunsOption = "",
    superlink: SuperLinkOption = "localhost:8000",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """Check all that a run needs and say what to do: SuperLink, proxy, certificates, centres, ledger, disk. Exit status 1 for a fault."""
    from server.operations.doctor import check_coordinator

    print_results(check_coordinator(superlink, ca, centres, resolve_runs_dir(runs), public))


@app.command("run")
def run_deployed(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="e.g. federation=folder federation.centres=[north,south]")
    ] = None,
    recipe: str = "multisource",
    runs: RunsOption = "",
    resume: Annotated[str, typer.Option(metavar="RUN", help="go on with this run")] = "",
    superlink: SuperLinkOption = "localhost:8000",
    ca: AuthorityOption = Path("ca.crt"),
    run_id: RunIdOption = "",
) -> None:
    """Run a recipe on the federation's hospitals and follow it."""
    from server.operations.superlink import run_on_superlink as start

    start(recipe, _split_overrides(overrides), superlink, ca, runs, resume, run_id)


@app.command()
def dashboard(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: int = 8080,
    runs: RunsOption = "",
    ledger: Annotated[
        str, typer.Option(help="a database address; empty: $CONSILIUM_LEDGER, or SQLite in the runs folder")
    ] = "",
    certificate: Annotated[Path | None, typer.Option(help="TLS certificate; with --key")] = None,
    key: Annotated[Path | None, typer.Option(help="its private key")] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(help="address or network of a reverse proxy that speaks TLS to the browsers"),
    ] = None,
    trust_header: Annotated[
        str, typer.Option(help="header by which the proxy names who has logged in, e.g. X-Forwarded-User")
    ] = "",
    metrics_from: Annotated[
        list[str] | None,
        typer.Option(help="addresses that may read /metrics without logging in; else this machine"),
    ] = None,
    superlink: Annotated[
        str,
        typer.Option(help="deployed: the SuperLink, host:port, at which runs are started; empty: simulation"),
    ] = "",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """The operator's console, a web page: centres, runs, learning, privacy, orders, audit trail. Accounts: `account add`."""
    from server.dashboard.serve import serve_console

    serve_console(
        host,
        port,
        resolve_runs_dir(runs),
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
    by_proxy: Annotated[
        bool, typer.Option("--by-proxy", help="no password here: the trusted reverse proxy asks for it")
    ] = False,
    runs: RunsOption = "",
    ledger: str = "",
) -> None:
    """Who may use the console. A new account's password is made at random and printed once."""
    from server.dashboard import accounts

    book = open_ledger(resolve_runs_dir(runs), ledger)
    by = f"{getpass.getuser()} at the coordinator"
    if what == "add":
        password = accounts.create_account(book, name, role, by, by_proxy)
        typer.echo(f"{name}, {role}" + (f": password {password}" if password else ", by the proxy"))
    elif what == "close":
        accounts.disable_account(book, name, by)
    elif what == "list":
        for row in book.read_accounts():
            typer.echo(f"{row['name']}  {row['role']}")
    else:
        raise ConsiliumError(f"account {what}: give add, close or list")


def _split_overrides(overrides: list[str] | None) -> list[str]:
    """Overrides as separate arguments or as one quoted text, as make passes them."""
    return [part for text in overrides or [] for part in shlex.split(text)]


def main() -> None:
    """The command's entry point."""
    run_app(app)
