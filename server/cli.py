"""`consilium-server`: the coordinator's command."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

import typer
import yaml
from rich.table import Table

from common.cli import run
from common.compose import compose, to_dict
from server import report as reports
from server.runs import find, open_ledger, runs_folder
from server.simulate import console
from server.simulate import simulate as simulate_run

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The coordinator: simulate, resume, compare, report, runs.")
Runs = Annotated[str, typer.Option("--runs", help="folder of results; empty: $CONSILIUM_RUNS or ./runs")]


@app.command()
def simulate(
    overrides: Annotated[list[str] | None, typer.Argument(help="e.g. stage.rounds=2 aggregation.tau=1")] = None,
    recipe: str = "multisource",
    runs: Runs = "",
    gpus: Annotated[float, typer.Option(help="share of a GPU for each centre")] = 0.0,
) -> None:
    """Run a recipe in Flower's simulation on this machine."""
    simulate_run(recipe, _split(overrides), runs, gpus=gpus)


@app.command()
def resume(run_id: Annotated[str, typer.Argument(metavar="RUN")], runs: Runs = "", gpus: float = 0.0) -> None:
    """Go on with an interrupted or paused simulation (a deployed run: flwr run . prod -c 'resume="RUN"')."""
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
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


@app.command("runs")
def list_runs(runs: Runs = "", ledger: str = "") -> None:
    """All runs in the ledger with their status."""
    folder = runs_folder(runs)
    shown = Table("run", "recipe", "mode", "status", "since")
    for row in open_ledger(folder, ledger).runs():
        shown.add_row(row["id"], row["recipe"], row["mode"], row["status"], f"{row['since']:%Y-%m-%d %H:%M:%S}")
    console.print(shown)


@app.command()
def config(overrides: Annotated[list[str] | None, typer.Argument()] = None, recipe: str = "multisource") -> None:
    """Print the resolved configuration without running anything."""
    typer.echo(yaml.safe_dump(to_dict(compose([f"recipe={recipe}", *_split(overrides)])), sort_keys=False), nl=False)


def _split(overrides: list[str] | None) -> list[str]:
    """Overrides as separate arguments or as one quoted text, as make passes them."""
    return [part for text in overrides or [] for part in shlex.split(text)]


def main() -> None:
    """The command's entry point."""
    run(app)
