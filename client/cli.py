"""`consilium-centre`: the hospital's command.

Each command imports what it needs, so that `--help` does not wait for PyTorch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from client.ingest.cli import ingest
from client.tools import commands
from client.tools.approve import approve
from common.utils.cli_main import print_plain, run_app
from common.utils.errors import ConsiliumError
from common.utils.hash_chain import GENESIS_HASH

if TYPE_CHECKING:
    from client.imaging.skipped import SkippedItem
    from client.imaging.slice_store import SliceStore
    from common.config.schema import Config

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables, which hold patients' names
    help="A hospital's side of a federation: prepare scans, watch what leaves, and use the finished model.",
)
app.command()(ingest)
console = Console()
SHOWN_LABELS = ("covid", "severity")  # whose counts `cohort` prints
SplitFractions = tuple[float, float, float]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="e.g. -s preprocess.selection=zquantile -s backbone=small"),
]
Workers = Annotated[int, typer.Option(help="processes that read scans")]


@app.command()
def cohort(
    folder: Annotated[
        Path, typer.Argument(help="DICOM, NIfTI, slice folders, images, or a manifest (.csv, .parquet)")
    ],
    out: Annotated[Path, typer.Option(help="the table to write: .csv or .parquet")] = Path("cohort.csv"),
    centre: Annotated[str, typer.Option(help="this centre's name")] = "centre",
    seed: int = 0,
    shares: Annotated[SplitFractions, typer.Option(help="train, val and test, by patient")] = (
        0.7,
        0.15,
        0.15,
    ),
) -> None:
    """Build and check a cohort table from a folder of scans."""
    from client.data.cohort import build_cohort, load_cohort, save_cohort
    from client.data.labels import check_labels
    from common.config.compose import compose_config

    table, skipped = build_cohort(folder, centre, seed, shares)
    save_cohort(table, out)
    load_cohort(out, centre)  # raises where it cannot be read back
    _print_skipped(skipped)
    label_columns = [column for column in table.columns if column in SHOWN_LABELS]
    summary = Table("split", "scans", "patients", *label_columns)
    for split, rows in table.groupby("split", sort=False):
        labels = [f"{rows[column].notna().sum()} labelled" for column in label_columns]
        summary.add_row(str(split), str(len(rows)), str(rows["patient"].nunique()), *labels)
    console.print(summary)
    for sentence in check_labels(table, compose_config().tasks):
        print_plain(console, f"note: {sentence}")
    print_plain(console, f"{len(table)} scans written to {out}, {len(skipped)} skipped")


@app.command()
def preprocess(
    data: Annotated[Path, typer.Argument(help="a cohort table, or a folder with cohort.csv")],
    settings: Overrides = None,
    state: Annotated[
        str, typer.Option(help="the centre's state folder; empty: .consilium beside the data")
    ] = "",
    workers: Workers = 2,
) -> None:
    """Read every scan, select its slices and store them, so that training can start at once."""
    from client.imaging.slice_store import SliceStore
    from client.site.config import Site, cohort_state_dir
    from common.config.compose import compose_config

    config = compose_config(settings or [])
    store = SliceStore(cohort_state_dir(Site(state=state), data) / "slices")
    num_ready, num_scans = _prepare_slices(data, "this centre", config, store, workers)
    if not num_ready:
        raise ConsiliumError(f"none of the {num_scans} scans could be prepared; the reasons are listed above")
    print_plain(console, f"{num_ready} of {num_scans} scans are ready in {store.folder}")


@app.command()
def montage(
    scan: Annotated[Path, typer.Argument(help="a DICOM folder, NIfTI file, slice folder or image")],
    out: Path = Path("montage.png"),
    settings: Overrides = None,
    window: Annotated[tuple[float, float] | None, typer.Option(help="in the scan's own units")] = None,
) -> None:
    """Draw a scan's selected slices with the lung outline and the area curve, for use inside the centre."""
    from client.imaging.montage import write_montage
    from common.config.compose import compose_config

    write_montage(scan, compose_config(settings or []).preprocess, out, window)
    print_plain(console, f"{out} shows pixels of a patient: it must not leave the centre")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="model.safetensors of a run")],
    folder: Annotated[Path, typer.Argument(help="new scans")],
    out: Path = Path("predictions.csv"),
    state: Annotated[Path, typer.Option(help="where slices are stored")] = Path(".consilium"),
    device: str = "auto",
    workers: Workers = 1,
    personal: Annotated[
        Path | None,
        typer.Option(help="this centre's local parameters of that run, STATE/personal/RUN"),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="folder for masks, NIfTI in each scan's own geometry")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="column to order the table by, the largest first: a worklist")
    ] = "",
) -> None:
    """Predict for every scan in FOLDER with MODEL: a table with one row a scan, and masks."""
    from client.site.config import Site
    from client.tools.predict import PredictOptions, predict_folder

    resolved_device = str(Site(device=device).resolve_device())
    options = PredictOptions(resolved_device, workers, personal, masks, sort)
    table, skipped = predict_folder(model, folder, state / "slices", options)
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    _print_skipped(skipped)
    print_plain(console, f"{len(table)} predictions written to {out}, {len(skipped)} skipped")


@app.command()
def phantom(
    root: Annotated[
        Path | None, typer.Argument(help="folder to write to; default: where simulations look for it")
    ] = None,
    settings: Overrides = None,
    prepare: Annotated[bool, typer.Option(help="also preprocess at each centre")] = True,
    workers: Workers = 2,
) -> None:
    """Write the made-up federation of four hospitals as DICOM, and preprocess it at each."""
    from client.imaging.slice_store import SliceStore
    from client.phantom.federation import write_federation
    from client.site.config import resolve_data_root
    from common.config.compose import compose_config, keep_effective_overrides

    overrides = list(settings or [])
    if root:
        overrides.append(f"federation.data_root={root.resolve()}")
    # Of a run's overrides only those that matter to its data are given here; without the others, some of them
    # may have no effect.
    config = compose_config(keep_effective_overrides(overrides))
    federation = config.federation
    if federation.phantom is None:
        raise ConsiliumError(f"federation '{federation.name}' is not made up; use federation=phantom")
    data_root = resolve_data_root(config)
    write_federation(data_root, federation.phantom, federation.centres)
    if not prepare:
        return
    for centre in federation.centres:
        folder = data_root / centre
        store = SliceStore(folder / ".consilium" / "slices")
        num_ready, _ = _prepare_slices(folder, centre, config, store, workers)
        print_plain(console, f"{centre}: {num_ready} scans ready")


@app.command("egress")
def show_egress(
    state: Annotated[Path, typer.Argument(help="the centre's state folder")] = Path(".consilium"),
    verify: Annotated[bool, typer.Option(help="only check the chain and print its last hash")] = False,
    anchor: Annotated[
        Path | None, typer.Option(help="the anchor file outside the state folder, .consilium-anchor-*.json")
    ] = None,
) -> None:
    """List what left this hospital, and check that no line was changed or removed."""
    from client.site.egress_anchor import RECORD_KINDS
    from client.site.egress_log import read_lines

    table = Table("time", "run", "stage", "round", "what", "bytes", "digest")
    num_lines = 0
    num_messages = 0
    last_hash = GENESIS_HASH
    for entry in read_lines(state, anchor):
        num_lines += 1
        num_messages += entry.kind not in RECORD_KINDS
        last_hash = entry.hash
        message = f"{entry.kind} {entry.query}".strip()
        round_number = str(entry.round or "")
        table.add_row(
            entry.time, entry.run, entry.stage, round_number, message, str(entry.bytes), entry.digest[:12]
        )
    if not verify:
        console.print(table)
    summary = f"the chain is intact, has {num_lines} lines and ends with {last_hash}"
    print_plain(console, f"{num_messages} messages left; {summary}")


@app.command("policy")
def show_policy(path: Annotated[Path, typer.Argument(help="policy.yaml")]) -> None:
    """Check a policy, and print its rules, what it leaves open, and the fingerprint of the code here."""
    from client.site.policy import describe_policy, list_open_rules, load_policy
    from common.protocol.code_fingerprint import fingerprint_code

    rules = load_policy(str(path))
    for rule, value in describe_policy(rules).items():
        print_plain(console, f"{rule}: {value}")
    for sentence in list_open_rules(rules):
        print_plain(console, f"WARNING: {sentence}")
    print_plain(console, f"code installed here: {fingerprint_code()}")


app.command()(approve)
app.command()(commands.key)
app.command()(commands.doctor)
app.command()(commands.metrics)
app.command("accept-loss")(commands.accept_loss)
app.command()(commands.releases)


def main() -> None:
    """Run the command."""
    run_app(app)


def _prepare_slices(
    data: Path, centre: str, config: Config, store: SliceStore, workers: int
) -> tuple[int, int]:
    """Preprocess a cohort, and its training scans once more for each further view; print the skipped scans.

    Returns how many scans are ready, and how many there are.
    """
    from client.data.cohort import filter_modality, load_cohort
    from client.data.loading import list_mask_columns
    from client.imaging.preprocess import preprocess_cohort

    settings = config.preprocess
    table = filter_modality(load_cohort(data, centre), settings.modality)
    base = data if data.is_dir() else data.parent
    mask_columns = list_mask_columns(config)
    keys, skipped = preprocess_cohort(table, base, settings, store, workers, mask_columns=mask_columns)
    training_scans = table[table["split"] == "train"]
    for view in range(1, settings.num_views + 1):
        view_settings = replace(settings, view=view)
        preprocess_cohort(training_scans, base, view_settings, store, workers, mask_columns=mask_columns)
    _print_skipped(skipped)
    num_ready = sum(1 for key in keys if key)
    return num_ready, len(keys)


def _print_skipped(skipped: list[SkippedItem]) -> None:
    """Print every scan that was skipped, with the reason."""
    for item in skipped:
        print_plain(console, f"skipped {item.path}: {item.reason}")
