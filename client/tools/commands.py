"""Commands of `consilium-centre` for the hospital's IT department: its key, a self-check, its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SiteFile = Annotated[Path, typer.Option(help="site.yaml")]
AuthorityFile = Annotated[Path, typer.Option(help="ca.crt of the kit")]


def key(
    path: Annotated[
        Path, typer.Argument(help="file for the private key; its public part gets the same name with .pub")
    ],
) -> None:
    """Make this centre's own key. The private part stays here; send the public part to the coordinator."""
    from common.utils.node_keys import extract_public_key, generate_key, key_fingerprint

    generate_key(path)
    public_key = extract_public_key(path)
    public_path = path.with_name(f"{path.name}.pub")
    public_path.write_text(f"{public_key}\n")
    typer.echo(public_key)
    typer.echo(
        f"send {public_path} to the coordinator, and read {key_fingerprint(public_key)} to them by "
        "telephone; "
        f"{path} stays here",
        err=True,
    )


def doctor(
    site: SiteFile = Path("/etc/consilium/site.yaml"),
    coordinator: Annotated[
        str, typer.Option(envvar="CONSILIUM_COORDINATOR", help="its address, host:port")
    ] = "",
    ca: AuthorityFile = Path("/etc/consilium/ca.crt"),
    key: Annotated[Path, typer.Option(help="this centre's private key")] = Path("/run/secrets/key"),
) -> None:
    """Check everything that a run needs here, and name the remedies.

    The exit status is 1 if there is a fault.
    """
    from client.tools.doctor import run_checks
    from common.utils.checks import print_results

    print_results(run_checks(site, coordinator, ca, key))


def accept_loss(
    site: SiteFile = Path("/etc/consilium/site.yaml"),
    state: Annotated[
        Path | None, typer.Option(help="the state folder of a simulated centre, which has no site.yaml")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Accept that lines of the egress log, or the privacy budget, are lost, so that messages may leave again.

    Restoring a backup is better: a lost budget forgets what was spent before. The egress log records the
    acceptance.
    """
    from client.site.anchored_files import accept_loss, list_losses
    from client.site.config import cohort_state_dir, outer_anchor, parse_site

    anchor = None
    folder = state
    if folder is None:
        settings = parse_site({"site": str(site)})
        data = Path(settings.data)
        folder = cohort_state_dir(settings, data)
        anchor = outer_anchor(settings, data)
    losses = list_losses(folder, anchor)
    for loss in losses:
        typer.echo(f"lost: {loss}")
    if not losses:
        typer.echo("nothing is lost; nothing was changed")
        return
    if not yes:
        typer.confirm("accept the loss? What was spent of the patients' privacy may be forgotten", abort=True)
    accept_loss(folder, anchor)
    typer.echo("accepted, and recorded in the egress log")


def metrics(
    site: SiteFile = Path("/etc/consilium/site.yaml"),
    ca: AuthorityFile = Path("/etc/consilium/ca.crt"),
    out: Annotated[
        Path | None,
        typer.Option(help="a file for node_exporter's textfile collector, *.prom; default: print them"),
    ] = None,
) -> None:
    """Print this centre's own metrics for its Prometheus: what left, privacy spent, disk, certificate."""
    from client.site.config import parse_site
    from client.tools.prometheus import render_metrics
    from common.utils.atomic_files import atomic_write

    text = render_metrics(parse_site({"site": str(site)}), ca)
    if out:
        atomic_write(out, text)
    else:
        typer.echo(text.decode(), nl=False)


def releases(
    site: SiteFile = Path("/etc/consilium/site.yaml"),
    forget: Annotated[bool, typer.Option(help="begin a new book; asks first")] = False,
) -> None:
    """List which questions about this hospital's patients were answered, and about how many patients.

    A question is not answered in another way later, because the difference of two answers can single
    patients out. `--forget` lifts that, and the egress log records it.
    """
    from client.site.config import cohort_state_dir, outer_anchor, parse_site
    from client.site.release_book import forget_releases, locate_book, read_book

    settings = parse_site({"site": str(site)})
    data = Path(settings.data)
    file = locate_book(cohort_state_dir(settings, data), outer_anchor(settings, data))
    book = read_book(file)
    if not book.answers:
        typer.echo("nothing was released that is kept in a book")
    for answer in book.answers:
        typer.echo(
            f"{answer.question.describe()}: since {answer.first_time}, by {book.splits}, "
            f"{answer.count_patients()} patients"
        )
    if not forget:
        return
    typer.confirm(
        "begin a new book? New answers can then be compared with those that have left, and the difference "
        "may single patients out",
        abort=True,
    )
    forget_releases(file)
    typer.echo("forgotten, and recorded in the egress log")
