"""What goes wrong in a deployed federation, one after another, done to real processes: no failure loses the run, and the ledger says what it was.

Four provisioned centres over TLS with node authentication; north, east and south reach the proxy directly, west through a relay that can be cut;
the ledger is a PostgreSQL server, so these need one to be installed. The tests of `long` are rounds of one run, in this order.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from tests.deploy import processes as p
from tests.deploy.faults import BUSY, CENTRES, DEADLINE, Federation, deployed

pytestmark = [pytest.mark.slow, pytest.mark.deploy]
ROUNDS = 60  # of the long run: it goes on while a centre is away, a few seconds a round on a quick machine


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL server is installed")
    with deployed(tmp_path_factory.mktemp("failures")) as there:
        yield there


@pytest.fixture(scope="module")
def weights(federation: Federation) -> bytes:
    """Of a run that nothing happened to, two rounds long."""
    run = federation.start("stage.rounds=2")
    federation.until(
        run, "the undisturbed run finishes", 900, lambda: federation.book().read_status(run) == "finished"
    )
    return (federation.folder / "runs" / run / "model.safetensors").read_bytes()


def test_the_coordinators_app_is_killed_and_the_superlink_away_for_long(
    federation: Federation, weights: bytes
) -> None:
    """Twice resumed in two rounds: once its process was gone, once the SuperLink had given it up. The weights are those of the undisturbed run."""
    run = federation.start("stage.rounds=2")
    federation.training(run, "south")  # the stage's start is round 0
    [app] = p.children(federation.processes.processes["superexec"].pid, "flwr-serverapp")
    os.kill(app, signal.SIGKILL)
    killed = time.monotonic()
    assert federation.kinds(run) == ["started"]  # it could say nothing any more
    federation.start(resume=run)
    [resumed] = [event for event in federation.events(run) if event["kind"] == "resumed"]
    assert resumed["detail"] == "the previous coordinator process exited without a status"
    federation.note(
        "kill -9 of the coordinator's app", "resumed by hand, same weights", time.monotonic() - killed
    )

    federation.training(run, "south")
    time.sleep(2)  # every centre has confirmed its message: before that, see deploy/README.md
    federation.processes.stop("superlink", signal.SIGKILL)
    time.sleep(100)
    back = time.monotonic()
    p.start_superlink(
        federation.processes, federation.folder / "made", int(federation.operator.rpartition(":")[2])
    )
    federation.until("", "the run pauses", 300, lambda: federation.book().read_status(run) == "paused")
    assert "SuperLink" in federation.events(run)[-1]["detail"]
    federation.start(resume=run)
    federation.note(
        "kill -9 of the SuperLink, away for 100 s",
        "pauses, resumed by hand, same weights",
        time.monotonic() - back,
    )
    federation.until(run, "the run finishes", 900, lambda: federation.book().read_status(run) == "finished")
    assert (federation.folder / "runs" / run / "model.safetensors").read_bytes() == weights
    assert [
        kind
        for kind in federation.kinds(run)
        if kind in ("started", "resumed", "paused", "finished", "failed")
    ] == [*("started", "resumed", "paused", "resumed", "finished")]


# --- one long run, to which things happen -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(federation: Federation) -> Iterator[str]:
    """A run of which half of the centres are enough for a round."""
    if os.getuid() == 0:  # a disk of its own, which can be filled
        disk = federation.hospital("south") / "state"
        disk.mkdir(exist_ok=True)
        with (federation.folder / "disk").open("wb") as image:
            image.truncate(48 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(federation.folder / "disk")], check=False)
        subprocess.run(["mount", "-o", "loop", str(federation.folder / "disk"), str(disk)], check=False)
    waits = (
        f"federation.round_timeout={DEADLINE}",
        "federation.quorum=0.5",
        "federation.round_retries=2",
        "federation.join_timeout=300",
    )
    yield federation.start(
        f"stage.rounds={ROUNDS}", "stage.local_epochs=5", "evaluation.checkpoint_selection=last", *waits
    )
    if os.path.ismount(federation.hospital("south") / "state"):
        subprocess.run(["umount", "-l", str(federation.hospital("south") / "state")], check=False)


def test_a_centre_is_killed_in_training(federation: Federation, long: str) -> None:
    """It is restarted at once, is refused while the SuperLink believes the old one to be there, and comes back after that."""
    round = federation.training(long, "north")
    federation.everything("north", signal.SIGKILL)
    killed = time.monotonic()
    federation.centre("north")
    federation.until(long, "north is left out", 200, lambda: "connect" in federation.said(long, "north"))
    federation.back(long, "north", round)
    assert "305" in federation.processes.log("north")  # refused, and tried again
    federation.note(
        "kill -9 of a centre in training",
        "round closes without it; it comes back by itself",
        time.monotonic() - killed,
    )


def test_the_ledgers_database_is_killed(federation: Federation, long: str) -> None:
    """The coordinator waits for it, and goes on."""
    round = federation.rounds(long)
    federation.database("kill")
    time.sleep(20)
    federation.database("start")
    took = federation.until(long, "the run goes on", 300, lambda: federation.rounds(long) > round + 1)
    federation.note("kill -9 of PostgreSQL, away for 20 s", "waited for, no round lost", took)
    assert "failed" not in federation.kinds(long)


def test_the_superlink_is_killed_and_back_at_once(federation: Federation, long: str) -> None:
    round = federation.training(long, "south")
    time.sleep(2)  # as above
    federation.processes.stop("superlink", signal.SIGKILL)
    killed = time.monotonic()
    p.start_superlink(
        federation.processes, federation.folder / "made", int(federation.operator.rpartition(":")[2])
    )
    away = time.monotonic() - killed
    for centre in CENTRES:
        federation.back(long, centre, round - 1)
    federation.note(
        f"kill -9 of the SuperLink, back after {away:.0f} s", "the run goes on", time.monotonic() - killed
    )
    assert {"paused", "failed"}.isdisjoint(federation.kinds(long))


def test_a_centre_is_slower_than_the_deadline(federation: Federation, long: str) -> None:
    round = federation.training(long, "east")
    for process in [
        *federation.apps("east"),
        *p.children(federation.processes.processes["east"].pid, "warm.py"),
    ]:
        os.kill(process, signal.SIGSTOP)
    federation.until(
        long, "east is left out", DEADLINE + 200, lambda: "no reply within" in federation.said(long, "east")
    )
    federation.everything("east", signal.SIGCONT)
    federation.note(
        "a centre slower than the deadline", "round closes without it", federation.back(long, "east", round)
    )


def test_a_centre_is_cut_off(federation: Federation, long: str) -> None:
    """For two minutes; nothing was restarted."""
    round = federation.training(long, "west")
    federation.processes.stop("relay", signal.SIGKILL)
    time.sleep(120)
    federation.until(
        long,
        "west is left out",
        200,
        lambda: any(w in federation.said(long, "west") for w in ("connect", "no reply")),
    )
    before = federation.processes.log("west").count("Starting Flower SuperNode")
    federation.connect()
    federation.note(
        "a centre cut off for 2 minutes",
        "rounds close without it; it comes back by itself",
        federation.back(long, "west", round),
    )
    assert federation.processes.log("west").count("Starting Flower SuperNode") == before


def test_a_contribution_is_not_finite(federation: Federation, long: str) -> None:
    """A centre whose memory, or GPU, is broken: NaN in one weight."""
    script = federation.folder / "home-south" / "bin" / "image.py"
    whole = script.read_text()
    spoiled = "import client.federation.local_round as a\nwas = a.train\n"
    spoiled += "def train(model, *n, **k):\n    said = was(model, *n, **k)\n    next(model.parameters()).data.fill_(float('nan'))\n    return said\n"
    round = federation.rounds(long)
    script.write_text(whole.replace("if __name__", spoiled + "a.train = train\nif __name__"))
    took = federation.until(
        long, "south is left out", 300, lambda: "not finite" in federation.said(long, "south")
    )
    script.write_text(whole)
    federation.note("a contribution with NaN", "left out: not finite", took)
    federation.back(long, "south", max(round, federation.rounds(long)))


def test_a_centres_disk_is_full(federation: Federation, long: str) -> None:
    """What cannot be recorded does not leave: the centre says so, and is there again as soon as there is room."""
    disk = federation.hospital("south") / "state"
    if not os.path.ismount(disk):
        pytest.skip("no file system can be mounted here")
    federation.training(long, "south")
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    with (disk / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0")
    federation.until(
        long,
        "south is left out",
        300,
        lambda: "egress log cannot be written" in federation.said(long, "south"),
    )
    round = federation.rounds(long)
    (disk / "filler").unlink()
    federation.note(
        "a centre's disk is full",
        "left out: its egress log cannot be written",
        federation.back(long, "south", round),
    )
    assert p.centre("egress", str(disk), "--verify").returncode == 0


def test_strangers_disturb_nobody(federation: Federation, long: str, tmp_path: Path) -> None:
    """Another's key at the Fleet API, and a SuperExec without the secret at the Runtime API, while the run goes on."""
    round = federation.rounds(long)
    stranger = tmp_path / "stranger"
    assert p.centre("key", str(stranger)).returncode == 0
    address = f"localhost:{federation.port}"
    node = p.start_centre(
        federation.processes, federation.hospital("north"), address, stranger, name="stranger"
    )
    (tmp_path / "guess").write_text("guess")
    p.start_superexec(
        federation.processes,
        federation.folder / "made",
        tmp_path / "guess",
        federation.operator,
        tmp_path,
        name="thief",
    )
    assert node.wait(200 * BUSY) != 0
    assert "Failed to activate SuperNode" in federation.processes.log("stranger")
    refused = lambda: "SuperExec authentication failed" in federation.processes.log("superlink")  # noqa: E731
    federation.until(long, "the stranger's SuperExec is refused", 200, refused)
    federation.until(long, "the run goes on", 300, lambda: federation.rounds(long) > round)
    federation.note("a wrong key; a stranger's SuperExec", "refused, the run goes on", 0)
    federation.processes.stop("thief")


def test_the_certificate_expires(federation: Federation, long: str) -> None:
    """The centres refuse the coordinator, the run pauses; with a new certificate they come back by themselves, and the resumed run finishes."""
    if "nginx" not in federation.processes.processes:
        pytest.skip("no nginx is installed")
    federation.training(long, "east")
    made = federation.folder / "made"
    kept = (made / "coordinator/server.crt").read_bytes()
    (made / "coordinator/server.crt").write_bytes(expired(kept, made))
    federation.processes.stop("nginx")
    federation.processes.start(
        "nginx",
        "nginx",
        "-c",
        str(made / "coordinator/nginx.here"),
        "-g",
        ("user root; " if os.getuid() == 0 else "") + "daemon off;",
    )
    federation.until("", "the run pauses", 500, lambda: federation.book().read_status(long) == "paused")
    detail = federation.events(long)[-1]["detail"]
    assert all(centre in detail for centre in CENTRES), detail
    checked = p.server("provision", str(federation.folder / "federation.yaml"), "--out", str(made), "--check")
    assert checked.returncode == 1
    assert "server.crt" in checked.stdout
    (made / "coordinator/server.crt").write_bytes(kept)
    federation.processes.stop("nginx")
    p.start_nginx(federation.processes, made, federation.port)
    renewed, round = time.monotonic(), federation.rounds(long)
    federation.start(resume=long)
    federation.until(long, "a round closes", 600, lambda: federation.rounds(long) > round)
    federation.note(
        "an expired certificate", "pauses; renewed and resumed by hand", time.monotonic() - renewed
    )


def test_the_long_run_finishes(federation: Federation, long: str) -> None:
    """To its last round, with all four centres in it; every centre's egress log is whole."""
    federation.until(
        long, "the long run finishes", 1500, lambda: federation.book().read_status(long) == "finished"
    )
    assert federation.rounds(long) == ROUNDS
    assert {c: row["accepted"] for c, row in federation.replies(long, ROUNDS).items()} == dict.fromkeys(
        CENTRES, True
    )
    for centre in CENTRES:
        assert p.centre("egress", str(federation.hospital(centre) / "state"), "--verify").returncode == 0


def test_a_centre_runs_another_version(federation: Federation, tmp_path: Path) -> None:
    """It has no part in the run, which the ledger says; the others go on."""
    for name in ("client", "common", "configs"):
        shutil.copytree(p.ROOT / name, tmp_path / name)
    with (tmp_path / "client" / "answer.py").open("a") as file:
        file.write("\n# the next version\n")
    federation.centre("west", PYTHONPATH=str(tmp_path))
    time.sleep(62)  # its SuperLink has not noticed that the other one is gone
    run = federation.start("stage.rounds=1", "federation.quorum=0.5", "federation.join_timeout=60")
    took = federation.until(
        run, "the run finishes", 900, lambda: federation.book().read_status(run) == "finished"
    )
    assert "runs other code" in federation.said(run, "west")
    assert "west" not in {c for c, row in federation.replies(run, 1).items() if row["accepted"]}
    federation.note("a centre with another version", "refused by name, the run finishes without it", took)
    federation.centre("west")


def expired(certificate: bytes, made: Path) -> bytes:
    """The same certificate, good until yesterday."""
    old = x509.load_pem_x509_certificate(certificate)
    key = serialization.load_pem_private_key((made / "ca.key").read_bytes(), None)
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
    )
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - dt.timedelta(days=9)).not_valid_after(now - dt.timedelta(days=1))
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]
