"""Failures of a deployed federation, done to real processes one after another.

No failure loses the run, and the ledger says what happened. Four provisioned centres over TLS with node
authentication: north, east and south reach the proxy directly, west through a relay that can be cut. The
ledger is a PostgreSQL server, so one must be installed. The tests with `long_run` are rounds of one run, in
this order.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.deploy.commands import run_centre_command, run_server_command
from tests.deploy.failing_federation import ROUNDS, expire_certificate, fill_disk, read_model
from tests.deploy.failing_federation import federation as federation
from tests.deploy.failing_federation import long_run as long_run
from tests.deploy.failing_federation import undisturbed_model as undisturbed_model
from tests.deploy.faults import BUSY, CENTRES, ROUND_TIMEOUT, Federation
from tests.deploy.process_group import ROOT, list_processes
from tests.deploy.processes import start_centre, start_nginx, start_superexec

pytestmark = [pytest.mark.slow, pytest.mark.deploy]
LIFECYCLE_EVENTS = ("started", "resumed", "paused", "finished", "failed")
# Until every centre has confirmed its message; deploy/README.md says what happens before that.
CONFIRMATION_SECONDS = 2
STARTED_SUPERNODE = "Starting Flower SuperNode"


def test_twice_resumed_run_has_the_undisturbed_runs_weights(
    federation: Federation, undisturbed_model: bytes
) -> None:
    """Once the coordinator's app is killed; once the SuperLink is away until it has given up the run."""
    run_id = federation.start_run("stage.rounds=2")
    federation.wait_until_training(run_id, "south")  # the stage's start is round 0
    [app] = list_processes(federation.processes.pid("superexec"), "flwr-serverapp")
    os.kill(app, signal.SIGKILL)
    killed = time.monotonic()
    assert federation.read_event_kinds(run_id) == ["started"]  # it could not write anything more
    federation.resume_run(run_id)
    [resumed] = [event for event in federation.read_events(run_id) if event["kind"] == "resumed"]
    assert resumed["detail"] == "the previous coordinator process exited without a status"
    seconds = time.monotonic() - killed
    federation.note_outcome("kill -9 of the coordinator's app", "resumed by hand, same weights", seconds)

    federation.wait_until_training(run_id, "south")
    time.sleep(CONFIRMATION_SECONDS)
    federation.processes.stop("superlink", signal.SIGKILL)
    time.sleep(100)
    restarted = time.monotonic()
    federation.start_superlink()
    federation.wait_until_paused(run_id, 300)
    assert "SuperLink" in federation.read_events(run_id)[-1]["detail"]
    federation.resume_run(run_id)
    federation.note_outcome(
        "kill -9 of the SuperLink, away for 100 s",
        "pauses, resumed by hand, same weights",
        time.monotonic() - restarted,
    )
    federation.wait_until_finished(run_id)
    assert read_model(federation, run_id) == undisturbed_model
    kinds = [kind for kind in federation.read_event_kinds(run_id) if kind in LIFECYCLE_EVENTS]
    assert kinds == ["started", "resumed", "paused", "resumed", "finished"]


def test_centre_killed_in_training_comes_back(federation: Federation, long_run: str) -> None:
    """It is restarted at once, but refused while the SuperLink believes that the old one is connected."""
    round_number = federation.wait_until_training(long_run, "north")
    federation.signal_centre("north", signal.SIGKILL)
    killed = time.monotonic()
    federation.start_centre("north")
    federation.wait_until_left_out(long_run, "north", ("connect",), 200)
    federation.wait_until_accepted(long_run, "north", round_number)
    assert "305" in federation.processes.read_log("north")  # Flower's exit code of the refusal
    federation.note_outcome(
        "kill -9 of a centre in training",
        "round closes without it; it comes back by itself",
        time.monotonic() - killed,
    )


def test_coordinator_waits_for_a_killed_database(federation: Federation, long_run: str) -> None:
    round_number = federation.last_round(long_run)
    federation.control_database("kill")
    time.sleep(20)
    federation.control_database("start")
    seconds = federation.wait_until(
        long_run, "the run goes on", 300, lambda: federation.last_round(long_run) > round_number + 1
    )
    federation.note_outcome("kill -9 of PostgreSQL, away for 20 s", "waited for, no round lost", seconds)
    assert "failed" not in federation.read_event_kinds(long_run)


def test_run_survives_a_superlink_that_is_restarted_at_once(federation: Federation, long_run: str) -> None:
    round_number = federation.wait_until_training(long_run, "south")
    time.sleep(CONFIRMATION_SECONDS)
    federation.processes.stop("superlink", signal.SIGKILL)
    killed = time.monotonic()
    federation.start_superlink()
    seconds_away = time.monotonic() - killed
    for centre in CENTRES:
        federation.wait_until_accepted(long_run, centre, round_number - 1)
    federation.note_outcome(
        f"kill -9 of the SuperLink, back after {seconds_away:.0f} s",
        "the run goes on",
        time.monotonic() - killed,
    )
    assert {"paused", "failed"}.isdisjoint(federation.read_event_kinds(long_run))


def test_round_closes_without_a_centre_slower_than_the_timeout(federation: Federation, long_run: str) -> None:
    round_number = federation.wait_until_training(long_run, "east")
    warm_processes = list_processes(federation.processes.pid("east"), "warm.py")
    for process in [*federation.list_client_apps("east"), *warm_processes]:
        os.kill(process, signal.SIGSTOP)
    federation.wait_until_left_out(long_run, "east", ("no reply within",), ROUND_TIMEOUT + 200)
    federation.signal_centre("east", signal.SIGCONT)
    seconds = federation.wait_until_accepted(long_run, "east", round_number)
    federation.note_outcome("a centre slower than the round timeout", "round closes without it", seconds)


def test_centre_that_was_cut_off_comes_back_without_a_restart(federation: Federation, long_run: str) -> None:
    """It is cut off for two minutes."""
    round_number = federation.wait_until_training(long_run, "west")
    federation.processes.stop("relay", signal.SIGKILL)
    time.sleep(120)
    federation.wait_until_left_out(long_run, "west", ("connect", "no reply"), 200)
    num_starts = federation.processes.read_log("west").count(STARTED_SUPERNODE)
    federation.start_relay()
    federation.note_outcome(
        "a centre cut off for 2 minutes",
        "rounds close without it; it comes back by itself",
        federation.wait_until_accepted(long_run, "west", round_number),
    )
    assert federation.processes.read_log("west").count(STARTED_SUPERNODE) == num_starts


def test_contribution_with_nan_is_left_out(federation: Federation, long_run: str) -> None:
    """A centre whose memory, or GPU, is broken: NaN in its weights after training."""
    script = federation.folder / "home-south" / "bin" / "image.py"
    intact_script = script.read_text()
    broken_training = "\n".join(
        [
            "import client.federation.local_round as local_round",
            "train_intact = local_round.train",
            "def train_broken(model, *arguments, **options):",
            "    result = train_intact(model, *arguments, **options)",
            "    next(model.parameters()).data.fill_(float('nan'))",
            "    return result",
            "local_round.train = train_broken",
            "",
        ]
    )
    round_number = federation.last_round(long_run)
    script.write_text(intact_script.replace("if __name__", broken_training + "if __name__"))
    seconds = federation.wait_until_left_out(long_run, "south", ("not finite",), 300)
    script.write_text(intact_script)
    federation.note_outcome("a contribution with NaN", "left out: not finite", seconds)
    federation.wait_until_accepted(long_run, "south", max(round_number, federation.last_round(long_run)))


def test_centre_with_a_full_disk_is_left_out_until_there_is_room(
    federation: Federation, long_run: str
) -> None:
    """What cannot be recorded in the egress log does not leave the centre."""
    disk = federation.hospital_folder("south") / "state"
    if not os.path.ismount(disk):
        pytest.skip("no file system can be mounted here")
    federation.wait_until_training(long_run, "south")
    fill_disk(disk / "filler")
    federation.wait_until_left_out(long_run, "south", ("egress log cannot be written",), 300)
    round_number = federation.last_round(long_run)
    (disk / "filler").unlink()
    federation.note_outcome(
        "a centre's disk is full",
        "left out: its egress log cannot be written",
        federation.wait_until_accepted(long_run, "south", round_number),
    )
    assert run_centre_command("egress", str(disk), "--verify").returncode == 0


def test_strangers_do_not_disturb_a_run(federation: Federation, long_run: str, tmp_path: Path) -> None:
    """A foreign key at the Fleet API, and a SuperExec without the secret at the Runtime API."""
    processes = federation.processes
    round_number = federation.last_round(long_run)
    stranger_key = tmp_path / "stranger"
    assert run_centre_command("key", str(stranger_key)).returncode == 0
    address = f"localhost:{federation.proxy_port}"
    north = federation.hospital_folder("north")
    node = start_centre(processes, north, address, stranger_key, name="stranger")
    guess = tmp_path / "guess"
    guess.write_text("guess")
    made = federation.folder / "made"
    start_superexec(processes, made, guess, federation.operator, tmp_path, name="intruder")
    assert node.wait(200 * BUSY) != 0
    assert "Failed to activate SuperNode" in processes.read_log("stranger")
    federation.wait_until(
        long_run,
        "the stranger's SuperExec is refused",
        200,
        lambda: "SuperExec authentication failed" in processes.read_log("superlink"),
    )
    federation.wait_until(
        long_run, "the run goes on", 300, lambda: federation.last_round(long_run) > round_number
    )
    federation.note_outcome("a wrong key; a stranger's SuperExec", "refused, the run goes on", 0)
    processes.stop("intruder")


def test_run_pauses_at_an_expired_certificate_and_resumes_with_a_new_one(
    federation: Federation, long_run: str
) -> None:
    """The centres refuse the coordinator; with a new certificate they come back by themselves."""
    if "nginx" not in federation.processes.processes:
        pytest.skip("no nginx is installed")
    federation.wait_until_training(long_run, "east")
    made = federation.folder / "made"
    certificate = made / "coordinator/server.crt"
    valid_certificate = certificate.read_bytes()
    certificate.write_bytes(expire_certificate(valid_certificate, made))
    federation.processes.stop("nginx")
    start_nginx(federation.processes, made, federation.proxy_port, waits=False)
    federation.wait_until_paused(long_run, 500)
    detail = federation.read_events(long_run)[-1]["detail"]
    assert all(centre in detail for centre in CENTRES), detail
    federation_file = str(federation.folder / "federation.yaml")
    check = run_server_command("provision", federation_file, "--out", str(made), "--check")
    assert check.returncode == 1
    assert "server.crt" in check.stdout
    certificate.write_bytes(valid_certificate)
    federation.processes.stop("nginx")
    start_nginx(federation.processes, made, federation.proxy_port)
    renewed = time.monotonic()
    round_number = federation.last_round(long_run)
    federation.resume_run(long_run)
    federation.wait_until(
        long_run, "a round closes", 600, lambda: federation.last_round(long_run) > round_number
    )
    federation.note_outcome(
        "an expired certificate", "pauses; renewed and resumed by hand", time.monotonic() - renewed
    )


def test_long_run_finishes_with_all_centres(federation: Federation, long_run: str) -> None:
    """Every centre counts in the last round, and every centre's egress log is intact."""
    federation.wait_until_finished(long_run, 1500)
    assert federation.last_round(long_run) == ROUNDS
    contributions = federation.read_contributions(long_run, ROUNDS)
    accepted = {centre: row["accepted"] for centre, row in contributions.items()}
    assert accepted == dict.fromkeys(CENTRES, True)
    for centre in CENTRES:
        state = federation.hospital_folder(centre) / "state"
        assert run_centre_command("egress", str(state), "--verify").returncode == 0


def test_centre_with_another_version_is_refused(federation: Federation, tmp_path: Path) -> None:
    """The ledger says so, and the others go on."""
    for name in ("client", "common", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    with (tmp_path / "client" / "app.py").open("a") as file:
        file.write("\n# the next version\n")
    federation.start_centre("west", PYTHONPATH=str(tmp_path))
    time.sleep(62)  # until the SuperLink has noticed that the old one is gone
    run_id = federation.start_run("stage.rounds=1", "federation.quorum=0.5", "federation.join_timeout=60")
    seconds = federation.wait_until_finished(run_id)
    assert "runs other code" in federation.read_centre_details(run_id, "west")
    assert "west" not in federation.list_accepted(run_id, 1)
    federation.note_outcome(
        "a centre with another version", "refused by name, the run finishes without it", seconds
    )
    federation.start_centre("west")
