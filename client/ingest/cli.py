"""`consilium-centre ingest`. What it needs is imported when it runs: `--help` need not wait for it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from common.utils.cli_main import print_plain
from common.utils.errors import ConsiliumError

if TYPE_CHECKING:
    from client.ingest.pipeline import IngestSummary
    from client.ingest.selection import StudySource

console = Console()


def ingest(
    source: Annotated[
        str,
        typer.Argument(
            help="https://pacs/dicom-web, dicom://AET@host:port?aet=OURS or a folder; default: `pacs` of --site"
        ),
    ] = "",
    data: Annotated[
        Path | None, typer.Option(help="the cohort's folder, or its .csv; default: `data` of --site")
    ] = None,
    site: Annotated[Path | None, typer.Option(help="site.yaml")] = None,
    since: Annotated[str, typer.Option(help="first day of study, 2020-04-01")] = "",
    until: Annotated[str, typer.Option(help="last day of study")] = "",
    modality: Annotated[
        list[str] | None, typer.Option(help="CT, CR, DX ...; default: CT and all radiographs")
    ] = None,
    body_part: Annotated[str, typer.Option(help="e.g. CHEST; what says another is passed over")] = "",
    studies: Annotated[
        Path | None,
        typer.Option("--list", help="CSV with a column study, accession or patient: take only these"),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV with a column study, accession or patient, and the labels")
    ] = None,
    watch: Annotated[
        bool, typer.Option(help="go on: look again every --every seconds until stopped")
    ] = False,
    every: Annotated[float, typer.Option(help="seconds", min=0.1)] = 60,
    quiet: Annotated[
        float, typer.Option(help="seconds without change after which a folder's study is complete", min=0)
    ] = 60,
    keep_mapping: Annotated[
        bool, typer.Option(help="write STATE/ingest/mapping.csv: which patient and study became which")
    ] = False,
    centre: Annotated[str, typer.Option(help="this centre's name; default: `centre` of --site")] = "",
    state: Annotated[
        str,
        typer.Option(
            help="the centre's state folder; default: `state` of --site, else .consilium beside the data"
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="of the splits, as `cohort` has it")] = 0,
) -> None:
    """Take studies from an archive (DICOMweb, C-FIND with C-GET or C-MOVE) or a folder, de-identified, into the cohort."""
    from client.imaging.readers.dicom_series import RADIOGRAPH_MODALITIES
    from client.ingest.pipeline import IngestPaths
    from client.ingest.pipeline import ingest_studies as bring_in
    from client.ingest.selection import StudyFilter, parse_date, read_study_list
    from client.site.config import cohort_state_dir, parse_site

    given = {"centre": centre, "data": str(data or ""), "state": state, "pacs": source}
    here = parse_site({**({"site": str(site)} if site else {}), **{k: v for k, v in given.items() if v}})
    if not here.pacs or not here.data:
        raise ConsiliumError(
            "say where studies come from and go to: consilium-centre ingest SOURCE --data FOLDER, or --site with `pacs` and `data`"
        )
    wanted = StudyFilter(
        parse_date(since),
        parse_date(until),
        tuple(modality or ("CT", *RADIOGRAPH_MODALITIES)),
        body_part,
        read_study_list(studies) if studies else (),
    )
    if "://" in here.pacs and not (wanted.date_range or wanted.identifiers):
        raise ConsiliumError(
            "this would take all that the archive holds; say which studies: --since and --until, or --list"
        )
    table = Path(here.data) if here.data.endswith(".csv") else Path(here.data) / "cohort.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    place = IngestPaths(
        table.resolve(),
        cohort_state_dir(here, table.parent),
        here.centre or "centre",
        seed,
        labels,
        keep_mapping,
    )
    for number in (signal.SIGINT, signal.SIGTERM) if watch else ():  # a container is stopped by the latter
        signal.signal(number, signal.default_int_handler)
    try:
        done = bring_in(
            _open_source(here.pacs, quiet), wanted, place, console, every if watch else 0, _print_summary
        )
    except KeyboardInterrupt:
        console.print("stopped; what came is kept, and the next ingest goes on from here")
        return
    _print_summary(done)
    print_plain(console, f"the cohort is {place.cohort_table}")
    if done.failed:
        raise typer.Exit(1)


def _open_source(address: str, settle_seconds: float) -> StudySource:
    """The source behind an address."""
    if address.startswith(("http://", "https://")):
        from client.ingest.dicomweb_source import open_dicomweb_source

        return open_dicomweb_source(address)
    if address.startswith("dicom://"):
        from client.ingest.dimse_source import open_dimse_source

        return open_dimse_source(address)
    from client.ingest.folder_source import open_folder_source

    return open_folder_source(Path(address), settle_seconds)


def _print_summary(summary: IngestSummary) -> None:
    """Studies by their new names only: what is printed may end in a log."""
    for one in summary.skipped:
        print_plain(console, f"study {one.path}: {one.reason}")
    for note in summary.notes:
        print_plain(console, f"note: {note}")
    counts = f"{summary.added} studies came, {summary.already_present} were here, {summary.empty} held nothing to take, {summary.failed} could not be brought in"
    print_plain(console, counts)
