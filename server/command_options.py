"""Options that several commands of `consilium-server` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunIdOption = Annotated[
    str, typer.Option("--id", help="the new run's id; empty: made from the time and the recipe")
]
RunsOption = Annotated[
    str, typer.Option("--runs", help="folder of results; empty: $CONSILIUM_RUNS or ./runs")
]
LedgerOption = Annotated[
    str, typer.Option(help="a database address; empty: $CONSILIUM_LEDGER, or SQLite in the folder of results")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="settings, e.g. stage.rounds=2 aggregation.tau=1")
]
SuperLinkOption = Annotated[str, typer.Option(envvar="CONSILIUM_SUPERLINK", help="its address, host:port")]
OptionalSuperLink = Annotated[
    str,
    typer.Option(
        "--superlink",
        envvar="CONSILIUM_SUPERLINK",
        help="the SuperLink that knows who is connected; empty: a simulation",
    ),
]
AuthorityOption = Annotated[Path, typer.Option("--ca", envvar="CONSILIUM_CA", help="the federation's ca.crt")]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="a run's id; `latest`: the newest in progress, or else the newest"),
]
