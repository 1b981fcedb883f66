"""`consilium-centre`: the hospital's command. Each command imports what it needs: `--help` need not wait for PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from client.ingest.cli import ingest
from common.utils.cli_main import print_plain, run_app
from common.utils.errors import ConsiliumError
from common.utils.hash_chain import GENESIS_HASH

if TYPE_CHECKING:
    from client.data.discovery import SkippedItem

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A hospital's side: ingest, cohort, preprocess, montage, predict, phantom, policy, egress, metrics, key, doctor.",
)
app.command()(ingest)
console = Console()
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="e.g. -s preprocess.selection=zquantile -s backbone=small"),
]
Workers = Annotated[int, typer.Option(help="processes that read scans")]


@app.command()
def cohort(
    folder: Annotated[
        Path, typer.Argument(help="DICOM, NIfTI, slice folders, pictures, or a manifest (.csv, .parquet)")
    ],
    out: Annotated[Path, typer.Option(help="the table to write: .csv or .parquet")] = Path("cohort.csv"),
    centre: Annotated[str, typer.Option(help="this centre's name")] = "centre",
    seed: int = 0,
    shares: Annotated[tuple[float, float, float], typer.Option(help="of train, val and test, by patient")] = (
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
    load_cohort(out, centre)  # what was written can be read
    _print_skipped(skipped)
    shown = Table("split", "scans", "patients", *[c for c in table.columns if c in ("covid", "severity")])
    for split, rows in table.groupby("split", sort=False):
        labels = [f"{rows[c].notna().sum()} labelled" for c in table.columns if c in ("covid", "severity")]
        shown.add_row(str(split), str(len(rows)), str(rows["patient"].nunique()), *labels)
    console.print(shown)
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
    """Read every scan, choose its slices and keep them, so that training can start at once."""
    from client.data.cohort import filter_modality, load_cohort
    from client.data.loading import list_mask_columns
    from client.imaging.preprocess import preprocess_cohort as bring_in
    from client.imaging.slice_store import SliceStore
    from client.site.config import Site, cohort_state_dir
    from common.config.compose import compose_config

    config = compose_config(settings or [])
    table = filter_modality(load_cohort(data, "this centre"), config.preprocess.modality)
    store = SliceStore(cohort_state_dir(Site(state=state), data) / "slices")
    base = data if data.is_dir() else data.parent
    keys, skipped = bring_in(
        table, base, config.preprocess, store, workers, mask_columns=list_mask_columns(config)
    )
    for draw in range(1, config.preprocess.num_views + 1):  # other choices of slices, for training
        chosen = replace(config.preprocess, view=draw)
        bring_in(
            table[table["split"] == "train"],
            base,
            chosen,
            store,
            workers,
            mask_columns=list_mask_columns(config),
        )
    _print_skipped(skipped)
    if not any(keys):
        raise ConsiliumError(
            f"none of the {len(keys)} scans could be made ready; the reasons are listed above"
        )
    print_plain(console, f"{sum(map(bool, keys))} of {len(keys)} scans are ready in {store.folder}")


@app.command()
def montage(
    scan: Annotated[Path, typer.Argument(help="a DICOM folder, NIfTI file, slice folder or picture")],
    out: Path = Path("montage.png"),
    settings: Overrides = None,
    window: Annotated[tuple[float, float] | None, typer.Option(help="in the scan's own units")] = None,
) -> None:
    """Draw a scan's chosen slices with the lung outline and the area curve. For the centre's eyes only."""
    from client.imaging.montage import write_montage as draw
    from common.config.compose import compose_config

    draw(scan, compose_config(settings or []).preprocess, out, window)
    print_plain(console, f"{out} shows pixels of a patient: it must not leave the centre")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="model.safetensors of a run")],
    folder: Annotated[Path, typer.Argument(help="new scans")],
    out: Path = Path("predictions.csv"),
    state: Annotated[Path, typer.Option(help="where slices are kept")] = Path(".consilium"),
    device: str = "auto",
    workers: Workers = 1,
    personal: Annotated[
        Path | None,
        typer.Option(
            help="this centre's own weights of that run, STATE/personal/RUN: the model becomes the centre's own"
        ),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="folder for masks, NIfTI in each scan's own geometry")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="column to order the table by, the largest first: a worklist")
    ] = "",
) -> None:
    """Predict for every scan in FOLDER by MODEL, the model.safetensors of a run: a table with one row a scan, and masks."""
    from client.site.config import Site
    from client.tools.predict import predict_folder as predict_folder

    place = str(Site(device=device).resolve_device())
    table, skipped = predict_folder(model, folder, state / "slices", place, workers, personal, masks, sort)
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
    from client.data.cohort import filter_modality, load_cohort
    from client.data.loading import list_mask_columns
    from client.imaging.preprocess import preprocess_cohort as bring_in
    from client.imaging.slice_store import SliceStore
    from client.phantom.federation import write_federation
    from client.site.config import resolve_data_root
    from common.config.compose import compose_config

    config = compose_config(
        [*(settings or []), *([f"federation.data_root={root.resolve()}"] if root else [])]
    )
    if config.federation.phantom is None:
        raise ConsiliumError(f"federation '{config.federation.name}' is not made up; use federation=phantom")
    where = resolve_data_root(config)
    write_federation(where, config.federation.phantom, config.federation.centres)
    for centre in config.federation.centres if prepare else []:
        folder = where / centre
        table, store = (
            filter_modality(load_cohort(folder, centre), config.preprocess.modality),
            SliceStore(folder / ".consilium" / "slices"),
        )
        keys, skipped = bring_in(
            table, folder, config.preprocess, store, workers, mask_columns=list_mask_columns(config)
        )
        print_plain(console, f"{centre}: {sum(map(bool, keys))} scans ready")
        _print_skipped(skipped)


@app.command("egress")
def show_egress(
    state: Annotated[Path, typer.Argument(help="the centre's state folder")] = Path(".consilium"),
    verify: Annotated[bool, typer.Option(help="only check the chain and say where it ends")] = False,
) -> None:
    """List what left this hospital, checking that no line was changed or removed."""
    from client.site import egress_log

    shown = Table("time", "run", "stage", "round", "what", "bytes", "digest")
    count, last = 0, GENESIS_HASH
    for entry in egress_log.read_entries(state):
        count, last = count + 1, entry["hash"]
        what = f"{entry['kind']} {entry['query']}".strip()
        run_, round_, size = entry["run"], str(entry["round"] or ""), str(entry["bytes"])
        shown.add_row(entry["time"], run_, entry["stage"], round_, what, size, entry["digest"][:12])
    if not verify:
        console.print(shown)
    print_plain(console, f"{count} messages left, the chain is whole; it ends with {last}")


@app.command("policy")
def show_policy(path: Annotated[Path, typer.Argument(help="policy.yaml")]) -> None:
    """Check a policy and print the rules in force, and the fingerprint of the code installed here."""
    from client.site.policy import describe_policy, load_policy
    from common.protocol.code_fingerprint import fingerprint_code

    for rule, value in describe_policy(load_policy(str(path))).items():
        print_plain(console, f"{rule}: {value}")
    print_plain(console, f"code installed here: {fingerprint_code()}")


@app.command()
def key(
    path: Annotated[
        Path, typer.Argument(help="where the private key goes; its public part: the same name with .pub")
    ],
) -> None:
    """Make this centre's own key: the private part stays here, the coordinator gets the public one."""
    from common.utils.node_keys import extract_public_key, generate_key, key_fingerprint

    generate_key(path)
    line = extract_public_key(path)
    public = path.with_name(f"{path.name}.pub")
    public.write_text(f"{line}\n")
    typer.echo(line)
    typer.echo(
        f"send {public} to the coordinator and read {key_fingerprint(line)} to them by telephone; {path} stays here",
        err=True,
    )


@app.command()
def doctor(
    site: Annotated[Path, typer.Option(help="site.yaml")] = Path("/etc/consilium/site.yaml"),
    coordinator: Annotated[
        str, typer.Option(envvar="CONSILIUM_COORDINATOR", help="its address, host:port")
    ] = "",
    ca: Annotated[Path, typer.Option(help="ca.crt of the kit")] = Path("/etc/consilium/ca.crt"),
    key: Annotated[Path, typer.Option(help="this centre's private key")] = Path("/run/secrets/key"),
) -> None:
    """Check all that a run needs here and say what to do: key, coordinator, clock, device, policy, data, disk. Exit status 1 for a fault."""
    from client.tools.doctor import run_checks
    from common.utils.checks import print_results

    print_results(run_checks(site, coordinator, ca, key))


@app.command()
def metrics(
    site: Annotated[Path, typer.Option(help="site.yaml")] = Path("/etc/consilium/site.yaml"),
    ca: Annotated[Path, typer.Option(help="ca.crt of the kit")] = Path("/etc/consilium/ca.crt"),
    out: Annotated[
        Path | None,
        typer.Option(help="a file for node_exporter's textfile collector, *.prom; default: print them"),
    ] = None,
) -> None:
    """This centre's own metrics for its Prometheus: what left, privacy spent, disk, certificate. Nothing listens for them."""
    from client.site.config import parse_site
    from client.tools.prometheus import render_metrics
    from common.utils.atomic_files import atomic_write

    text = render_metrics(parse_site({"site": str(site)}), ca)
    if out:
        atomic_write(out, text)
    else:
        typer.echo(text.decode(), nl=False)


def _print_skipped(skipped: list[SkippedItem]) -> None:
    """Every scan that was passed over, with the reason: at the centre, for the person who typed the command."""
    for one in skipped:
        print_plain(console, f"skipped {one.path}: {one.reason}")


def main() -> None:
    """The command's entry point."""
    run_app(app)
