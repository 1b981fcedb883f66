"""`consilium-centre ingest`.

The command imports what it needs when it runs, so that `--help` does not wait for it.
"""

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
    from client.ingest.selection import StudyFilter
    from client.ingest.study_source import StudySource
    from client.site.config import Site

console = Console()

SourceAddress = Annotated[
    str,
    typer.Argument(
        help="https://pacs/dicom-web, dicom://AET@host:port?aet=OURS or a folder; default: `pacs` of --site"
    ),
]
DataPath = Annotated[
    Path | None, typer.Option(help="the cohort's folder or its .csv; default: `data` of --site")
]
SiteFile = Annotated[Path | None, typer.Option(help="site.yaml")]
FirstDay = Annotated[str, typer.Option(help="first study date, e.g. 2020-04-01")]
LastDay = Annotated[str, typer.Option(help="last study date")]
Modalities = Annotated[list[str] | None, typer.Option(help="CT, CR, DX ...; default: CT and all radiographs")]
BodyPart = Annotated[str, typer.Option(help="e.g. CHEST; series of another known body part are skipped")]
StudyList = Annotated[
    Path | None,
    typer.Option("--list", help="CSV with a column study, accession or patient: ingest only these"),
]
LabelsFile = Annotated[
    Path | None, typer.Option(help="CSV with a column study, accession or patient, and the labels")
]
Watch = Annotated[bool, typer.Option(help="look for new studies every --every seconds until stopped")]
Interval = Annotated[float, typer.Option(help="seconds", min=0.1)]
SettleTime = Annotated[
    float, typer.Option(help="seconds without a change after which a study in a folder is complete", min=0)
]
KeepMapping = Annotated[
    bool, typer.Option(help="write STATE/ingest/mapping.csv, which links pseudonyms to patients and studies")
]
Centre = Annotated[str, typer.Option(help="this centre's name; default: `centre` of --site")]
StateFolder = Annotated[
    str,
    typer.Option(
        help="the centre's state folder; default: `state` of --site, else .consilium beside the data"
    ),
]
SplitSeed = Annotated[int, typer.Option(help="of the splits, as for `cohort`")]


def ingest(
    source: SourceAddress = "",
    data: DataPath = None,
    site: SiteFile = None,
    since: FirstDay = "",
    until: LastDay = "",
    modality: Modalities = None,
    body_part: BodyPart = "",
    studies: StudyList = None,
    labels: LabelsFile = None,
    watch: Watch = False,
    every: Interval = 60,
    quiet: SettleTime = 60,
    keep_mapping: KeepMapping = False,
    centre: Centre = "",
    state: StateFolder = "",
    seed: SplitSeed = 0,
) -> None:
    """Add studies from an archive (DICOMweb, C-GET or C-MOVE) or a folder to the cohort, de-identified."""
    from client.ingest.pipeline import IngestPaths, ingest_studies
    from client.site.config import cohort_state_dir

    settings = _read_settings(site, centre=centre, data=str(data or ""), state=state, pacs=source)
    study_filter = _make_study_filter(since, until, modality, body_part, studies)
    if "://" in settings.pacs and not (study_filter.date_range or study_filter.identifiers):
        raise ConsiliumError(
            "without dates or a list, the whole archive would be ingested; "
            "give --since and --until, or --list"
        )
    table = _find_cohort_table(settings)
    paths = IngestPaths(
        cohort_table=table.resolve(),
        state_dir=cohort_state_dir(settings, table.parent),
        centre=settings.centre or "centre",
        seed=seed,
        labels_path=labels,
        keep_mapping=keep_mapping,
    )
    interval = 0.0
    if watch:
        interval = every
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a container is stopped by SIGTERM
    try:
        study_source = _open_source(settings.pacs, quiet)
        summary = ingest_studies(study_source, study_filter, paths, console, interval, _print_summary)
    except KeyboardInterrupt:
        console.print("stopped; studies ingested so far are kept, and the next ingest continues from here")
        return
    _print_summary(summary)
    print_plain(console, f"the cohort table is {paths.cohort_table}")
    if summary.failed:
        raise typer.Exit(1)


def _read_settings(site_file: Path | None, **options: str) -> Site:
    """Return the site's settings, with the options that are given in their place."""
    from client.site.config import parse_site

    values = {key: value for key, value in options.items() if value}
    if site_file is not None:
        values["site"] = str(site_file)
    settings = parse_site(values)
    if not settings.pacs or not settings.data:
        raise ConsiliumError(
            "no source or no data folder is given; run consilium-centre ingest SOURCE --data FOLDER, or give "
            "--site with `pacs` and `data`"
        )
    return settings


def _make_study_filter(
    since: str, until: str, modalities: list[str] | None, body_part: str, study_list: Path | None
) -> StudyFilter:
    from client.imaging.readers.dicom_series import RADIOGRAPH_MODALITIES
    from client.ingest.selection import StudyFilter, parse_date, read_study_list

    return StudyFilter(
        since=parse_date(since),
        until=parse_date(until),
        modalities=tuple(modalities or ("CT", *RADIOGRAPH_MODALITIES)),
        body_part=body_part,
        identifiers=read_study_list(study_list) if study_list else (),
    )


def _find_cohort_table(settings: Site) -> Path:
    """Return the path of the cohort table and create its folder."""
    table = Path(settings.data)
    if not settings.data.endswith(".csv"):
        table = table / "cohort.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    return table


def _open_source(address: str, settle_seconds: float) -> StudySource:
    """Open the archive or folder at an address."""
    if address.startswith(("http://", "https://")):
        from client.ingest.dicomweb_source import open_dicomweb_source

        return open_dicomweb_source(address)
    if address.startswith("dicom://"):
        from client.ingest.dimse_source import open_dimse_source

        return open_dimse_source(address)
    from client.ingest.folder_source import open_folder_source

    return open_folder_source(Path(address), settle_seconds)


def _print_summary(summary: IngestSummary) -> None:
    """Print a summary; it names studies by pseudonym, because the output may end up in a log."""
    for item in summary.skipped:
        print_plain(console, f"study {item.path}: {item.reason}")
    for note in summary.notes:
        print_plain(console, f"note: {note}")
    print_plain(
        console,
        f"{summary.added} studies added, {summary.already_present} already present, "
        f"{summary.empty} without images to take, {summary.failed} failed",
    )
