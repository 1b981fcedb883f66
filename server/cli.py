"""`consilium-server`: the coordinator's command."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.table import Table

from common.config.compose import compose_config, keep_effective_overrides
from common.config.parse import config_to_dict
from common.config.recipe_digest import compute_recipe_digest
from common.utils.cli_main import print_plain, run_app
from common.utils.errors import ConsiliumError, suggest
from server.command_options import (
    AuthorityOption,
    LedgerOption,
    OptionalSuperLink,
    OverridesArgument,
    RunArgument,
    RunIdOption,
    RunsOption,
    SuperLinkOption,
)
from server.dashboard import commands as console_commands
from server.monitoring.health import SuperLinkNode
from server.operations import commands as operator_commands
from server.operations.simulation import run_simulation
from server.operations.submission import plan_submission, rich_console
from server.reporting.report import write_report
from server.reporting.terminal_tables import build_comparison_table, build_result_table
from server.rounds.run_lifecycle import find_run_dir, open_ledger, resolve_runs_dir
from server.run.records import RunResult, parse_result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, which hold patients' names
    help="The coordinator: simulate, run and watch federated training; operate a deployed federation.",
)


@app.command()
def simulate(
    overrides: OverridesArgument = None,
    recipe: str = "multisource",
    runs: RunsOption = "",
    gpus: Annotated[float, typer.Option(help="fraction of a GPU for each centre")] = 0.0,
    run_id: RunIdOption = "",
) -> None:
    """Run a recipe in Flower's simulation on this machine."""
    run_simulation(recipe, _split_overrides(overrides), runs, gpus=gpus, run_id=run_id)


@app.command()
def resume(
    run_id: Annotated[str, typer.Argument(metavar="RUN")], runs: RunsOption = "", gpus: float = 0.0
) -> None:
    """Resume an interrupted or paused simulation (a deployed run: `run --resume RUN`)."""
    run_simulation("", [], runs, resume_id=run_id, gpus=gpus)


@app.command()
def compare(overrides: OverridesArgument = None, recipe: str = "multisource", runs: RunsOption = "") -> None:
    """Compare federated, central and local training, with equal numbers of optimiser steps."""
    results = {}
    for mode in ("federated", "central", "local"):
        settings = _split_overrides(overrides)
        if mode != "federated":  # what concerns the exchange of updates has no effect there
            settings = keep_effective_overrides(
                settings, fixed=[f"recipe={recipe}", f"federation.mode={mode}"]
            )
        run_dir = run_simulation(recipe, [*settings, f"federation.mode={mode}"], runs)
        results[mode] = _load_result(run_dir)
    rich_console.print(build_comparison_table(results))


@app.command("run")
def run_deployed(
    overrides: OverridesArgument = None,
    recipe: str = "multisource",
    runs: RunsOption = "",
    resume: Annotated[str, typer.Option(metavar="RUN", help="resume this run")] = "",
    superlink: SuperLinkOption = "localhost:8000",
    ca: AuthorityOption = Path("ca.crt"),
    run_id: RunIdOption = "",
) -> None:
    """Run a recipe on the federation's hospitals and follow it."""
    from server.operations.superlink import run_on_superlink

    submission = plan_submission(recipe, _split_overrides(overrides), resolve_runs_dir(runs), resume, run_id)
    run_on_superlink(submission, superlink, ca)


@app.command()
def config(overrides: OverridesArgument = None, recipe: str = "multisource") -> None:
    """Print the resolved configuration and its digest, by which hospitals approve it; run nothing."""
    resolved = compose_config([f"recipe={recipe}", *_split_overrides(overrides)])
    typer.echo(yaml.safe_dump(config_to_dict(resolved), sort_keys=False), nl=False)
    typer.echo(f"# digest for `consilium-centre approve`: {compute_recipe_digest(resolved)}")


@app.command()
def report(run_id: Annotated[str, typer.Argument(metavar="RUN")] = "latest", runs: RunsOption = "") -> None:
    """Write a run's report.html again and print its table."""
    run_dir = find_run_dir(resolve_runs_dir(runs), run_id)
    result = _load_result(run_dir)
    write_report(run_dir / "report.html", result)
    rich_console.print(build_result_table(result))
    print_plain(rich_console, f"report: {run_dir / 'report.html'}")


@app.command("runs")
def list_runs(runs: RunsOption = "", ledger: LedgerOption = "") -> None:
    """List all runs in the ledger with their status."""
    table = Table("run", "recipe", "mode", "status", "since")
    for row in open_ledger(resolve_runs_dir(runs), ledger).read_runs():
        since = f"{row['since']:%Y-%m-%d %H:%M:%S}"
        table.add_row(row["id"], row["recipe"], row["mode"], row["status"], since)
    rich_console.print(table)


@app.command("show")
def show_run(
    run_id: RunArgument = "latest",
    runs: RunsOption = "",
    ledger: LedgerOption = "",
    superlink: OptionalSuperLink = "",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """Show a run's status now: stage, round, every centre with its state and numbers, the last events."""
    from server.monitoring import terminal

    run_ledger = open_ledger(resolve_runs_dir(runs), ledger)
    list_nodes = _make_node_lister(superlink, ca)
    nodes = list_nodes() if list_nodes else None
    rich_console.print(terminal.render_status(run_ledger, terminal.resolve_run(run_ledger, run_id), nodes))


@app.command("watch")
def watch_run(
    run_id: RunArgument = "latest",
    runs: RunsOption = "",
    ledger: LedgerOption = "",
    superlink: OptionalSuperLink = "",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """Show a run's status, live, until it ends or waits for a person. Ctrl-C does not stop the run."""
    from server.monitoring import terminal

    run_ledger = open_ledger(resolve_runs_dir(runs), ledger)
    run_id = terminal.resolve_run(run_ledger, run_id)["id"]
    with contextlib.suppress(KeyboardInterrupt):
        terminal.watch_status(run_ledger, run_id, _make_node_lister(superlink, ca), rich_console)


@app.command()
def metrics(
    runs: RunsOption = "",
    ledger: LedgerOption = "",
    superlink: OptionalSuperLink = "",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """Print the metrics that the console shows to Prometheus, for node_exporter's textfile collector."""
    from server.monitoring.prometheus import render_metrics
    from server.operations.superlink import read_certificate_expiries

    expiries = read_certificate_expiries(superlink, ca) if superlink else {}
    run_ledger = open_ledger(resolve_runs_dir(runs), ledger)
    typer.echo(render_metrics(run_ledger, _make_node_lister(superlink, ca), expiries).decode(), nl=False)


@app.command("export")
def export_run(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    to: Annotated[str, typer.Option(help="safetensors | onnx | csv | card | tensorboard")],
    out: Annotated[
        str,
        typer.Option(
            help="the file to write (card: .md or .html), a folder for tensorboard; "
            "empty: in the run's folder, or here"
        ),
    ] = "",
    runs: RunsOption = "",
    ledger: LedgerOption = "",
) -> None:
    """Export a run's artefacts for sharing.

    Weights, ONNX checked against PyTorch, scores, model card, curves.
    """
    from server.reporting.export import EXPORTERS

    run_dir = find_run_dir(resolve_runs_dir(runs), run_id)
    run_ledger = open_ledger(resolve_runs_dir(runs), ledger)
    if to not in EXPORTERS:
        raise ConsiliumError(f"--to {to} is not a format{suggest(to, EXPORTERS)}")
    typer.echo(EXPORTERS[to](run_dir, run_ledger, out))


app.command()(operator_commands.backup)
app.command()(operator_commands.restore)
app.command()(operator_commands.upgrade)
app.command()(operator_commands.provision)
app.command()(operator_commands.admit)
app.command()(operator_commands.doctor)
app.command()(console_commands.dashboard)
app.command()(console_commands.account)


def main() -> None:
    """Run the command."""
    run_app(app)


def _load_result(run_dir: Path) -> RunResult:
    return parse_result(json.loads((run_dir / "metrics.json").read_text()))


def _make_node_lister(superlink: str, ca: Path) -> Callable[[], list[SuperLinkNode]] | None:
    """Return a function that asks the SuperLink for its centres; None in a simulation."""
    if not superlink:
        return None
    from server.operations.superlink import list_nodes

    return lambda: list_nodes(superlink, ca)


def _split_overrides(overrides: list[str] | None) -> list[str]:
    """Return overrides as separate arguments, whether given so or as one quoted text, as make passes them."""
    separate: list[str] = []
    for text in overrides or []:
        separate += shlex.split(text)
    return separate
