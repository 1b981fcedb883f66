"""The operator's commands of `consilium-server`: back-up, provisioning, admission, self-check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.utils.checks import print_results
from server.command_options import AuthorityOption, LedgerOption, RunsOption, SuperLinkOption
from server.rounds.run_lifecycle import open_ledger, resolve_ledger_address, resolve_runs_dir

CENTRES_FOLDER = Path("/etc/centres")


def backup(
    file: Annotated[Path, typer.Argument(help="a tar file; -: standard output")],
    runs: RunsOption = "",
    ledger: LedgerOption = "",
) -> None:
    """Write all runs and the ledger to one file. Runs may be in progress."""
    from server.operations.backup import write_backup

    runs_dir = resolve_runs_dir(runs)
    for sentence in write_backup(file, runs_dir, open_ledger(runs_dir, ledger)):
        typer.echo(sentence, err=True)


def restore(
    file: Annotated[Path, typer.Argument(help="a file that backup wrote; -: standard input")],
    runs: RunsOption = "",
    ledger: LedgerOption = "",
) -> None:
    """Restore a back-up into an empty folder and a new ledger. Its runs can be resumed there."""
    from server.operations.backup import restore_backup

    runs_dir = resolve_runs_dir(runs)
    for sentence in restore_backup(file, runs_dir, open_ledger(runs_dir, ledger)):
        typer.echo(sentence, err=True)


def upgrade(
    runs: Annotated[str, typer.Argument(help="folder of results; empty: $CONSILIUM_RUNS or ./runs")] = "",
    ledger: Annotated[
        str,
        typer.Option(
            help="address of the old ledger; empty: $CONSILIUM_LEDGER, or SQLite in the folder of results"
        ),
    ] = "",
    to: Annotated[
        str,
        typer.Option(
            help="address of the new ledger, an empty database; empty: the place of the old one (SQLite only)"
        ),
    ] = "",
    leave_unfinished: Annotated[
        bool, typer.Option("--leave-unfinished", help="give up the runs that 0.1.0 has not finished")
    ] = False,
) -> None:
    """Migrate the ledger and the finished runs of version 0.1.0; the old files are kept as *.0.1.0."""
    from server.operations.upgrade import upgrade_coordinator

    runs_dir = resolve_runs_dir(runs)
    old_address = resolve_ledger_address(runs_dir, ledger)
    for sentence in upgrade_coordinator(runs_dir, old_address, to or old_address, leave_unfinished):
        typer.echo(sentence)


def provision(
    federation: Annotated[Path, typer.Argument(help="federation.yaml; see deploy/README.md for its keys")],
    out: Annotated[
        Path, typer.Option(help="folder for the authority, the coordinator's files and the kits")
    ] = Path("federation"),
    revoke: Annotated[str, typer.Option(metavar="CENTRE", help="revoke this centre's key")] = "",
    reissue: Annotated[
        str,
        typer.Option(
            metavar="CENTRE", help="make a new key for this centre, or a new certificate for 'coordinator'"
        ),
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="only report what is there, what expires and what does not fit")
    ] = False,
) -> None:
    """Make certificates, keys, secrets and one archive per hospital, offline. Existing files are kept."""
    from server.operations.provision import provision_federation, revoke_centre
    from server.operations.provision_checks import check_provisioning

    if check:
        print_results(check_provisioning(federation, out))
        return
    if revoke:
        typer.echo(revoke_centre(out, revoke))
        return
    for sentence in provision_federation(federation, out, reissue):
        typer.echo(sentence)


def admit(
    centres: Annotated[Path, typer.Argument(help="folder of the centres' public keys")] = CENTRES_FOLDER,
    superlink: SuperLinkOption = "localhost:8000",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """Make the SuperLink admit exactly the centres whose public keys lie in CENTRES."""
    from server.operations.superlink import sync_nodes

    changes = list(sync_nodes(centres, superlink, ca))
    typer.echo("\n".join(changes) or "nothing to change")


def doctor(
    public: Annotated[
        str, typer.Option(help="the address that hospitals reach, host:port; checks what can be seen there")
    ] = "",
    centres: Annotated[Path, typer.Option(help="folder of the centres' public keys")] = CENTRES_FOLDER,
    runs: RunsOption = "",
    superlink: SuperLinkOption = "localhost:8000",
    ca: AuthorityOption = Path("ca.crt"),
) -> None:
    """Check everything that a run needs, and name the remedies. The exit status is 1 if there is a fault."""
    from server.operations.doctor import check_coordinator

    print_results(check_coordinator(superlink, ca, centres, resolve_runs_dir(runs), public))
