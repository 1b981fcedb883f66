"""Two provisioned centres as processes: a run over TLS with node authentication, through the proxy; who has no business there is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deploy import processes as p

pytestmark = [pytest.mark.slow, pytest.mark.deploy]
CENTRES = ["north", "south"]
PHANTOM = [
    "federation.phantom.scale=0.03",
    "federation.phantom.num_slices=12",
    "federation.phantom.image_size=64",
    "preprocess.image_size=32",
    f"federation.centres=[{','.join(CENTRES)}]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    settings = [part for o in PHANTOM for part in ("-s", o)]
    made = p.centre("phantom", str(folder), *settings, "--no-prepare")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, data: Path
) -> Iterator[tuple[p.Started, Path, str, str, Path]]:
    """A running coordinator and two hospitals: (processes, folder, address for hospitals, address for the operator, results)."""
    folder = tmp_path_factory.mktemp("federation")
    port = p.free_port()
    assert p.centre("key", str(folder / "south.key")).returncode == 0  # this hospital makes its own
    centres = {"north": {"device": "cpu"}, "south": {"device": "cpu", "public_key": "south.key.pub"}}
    (folder / "federation.yaml").write_text(
        yaml.safe_dump({"address": f"localhost:{port}", "centres": centres})
    )
    made = p.server("provision", str(folder / "federation.yaml"), "--out", str(folder / "made"))
    assert made.returncode == 0, made.stderr
    with p.started(folder) as processes:
        operator = p.start_coordinator(processes, folder / "made", folder / "runs", port)
        admitted = p.server(
            "admit",
            str(folder / "made/coordinator/centres"),
            "--superlink",
            operator,
            "--ca",
            str(folder / "made/ca.crt"),
        )
        assert admitted.returncode == 0, admitted.stderr
        assert admitted.stdout.count("let in, as node") == 2
        for name in CENTRES:
            hospital = p.unpack(
                folder / "made" / "kits" / f"{name}.tar.gz", folder / "hospitals", data / name
            )
            if name == "south":
                assert not (hospital / "key").exists()
                shutil.copy(folder / "south.key", hospital / "key")
            p.start_centre(processes, hospital, f"localhost:{port}")
        yield processes, folder, f"localhost:{port}", operator, folder / "runs"


def test_a_run_through_the_proxy(
    federation: tuple[p.Started, Path, str, str, Path], data: Path, tmp_path: Path
) -> None:
    """Two rounds of the paper's recipe to the simulation's very weights; every centre's egress log is whole and knows the run; no key in any log
    or in the ledger."""
    processes, folder, address, operator, runs = federation
    authority, centres = str(folder / "made/ca.crt"), folder / "made/coordinator/centres"
    overrides = [
        *("federation=folder", f"federation.centres=[{','.join(CENTRES)}]"),
        *(
            "stage.rounds=2",
            "stage.local_epochs=1",
            "stage.batch_size=4",
            "preprocess.image_size=32",
            "evaluation.checkpoint_selection=last",
        ),
    ]
    ran = p.server(
        *("run", "--superlink", operator, "--ca", authority, "--runs", str(runs), *overrides), timeout=1200
    )
    logs = "\n".join(f"== {name}\n{processes.log(name)[-3000:]}" for name in processes.processes)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:] + logs
    run = (runs / "latest").resolve()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    policies = [folder / "hospitals" / name / "policy.yaml" for name in CENTRES]
    p.as_simulated(run / "model.safetensors", overrides, data, policies, tmp_path)
    doctor = p.server(
        "doctor",
        "--superlink",
        operator,
        "--ca",
        authority,
        "--public",
        address,
        "--centres",
        str(centres),
        "--runs",
        str(runs),
    )
    assert [
        line for line in doctor.stdout.splitlines() if line.startswith("fault") and "GB free" not in line
    ] == [], doctor.stdout
    assert doctor.stdout.count(": online, key ") == 2
    for name in CENTRES:
        state = folder / "hospitals" / name / "state"
        verified = p.centre("egress", str(state), "--verify")
        assert verified.returncode == 0, verified.stderr
        sent = [json.loads(line) for line in (state / "egress.jsonl").read_text().splitlines()]
        assert {entry["run"] for entry in sent} == {run.name}
        assert "TrainReply" in {entry["kind"] for entry in sent}
    said = b"".join(path.read_bytes() for path in [*folder.glob("*.log"), *runs.rglob("*")] if path.is_file())
    secrets = [
        folder / "made/keys/north",
        folder / "made/coordinator/superexec.secret",
        folder / "made/coordinator/server.key",
    ]
    for secret in secrets:
        assert secret.read_bytes().strip().splitlines()[-2 if secret.suffix != ".secret" else 0] not in said


def test_what_the_centre_runs_is_its_own_code(
    federation: tuple[p.Started, Path, str, str, Path], tmp_path: Path
) -> None:
    """A coordinator that sends another client cannot have it run: the hospital's own answers, and says that the code differs."""
    _, folder, _, operator, runs = federation
    other = tmp_path / "app"
    for name in ("client", "common", "server", "configs"):
        shutil.copytree(p.ROOT / name, other / name)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(p.ROOT / name, other / name)
    spoken = folder / "the-coordinators-code-ran-here"
    with (other / "client" / "answer.py").open("a") as file:
        file.write(f"\nopen({str(spoken)!r}, 'w').close()\n")
    ran = p.command(
        *(
            "server.cli",
            "run",
            "--superlink",
            operator,
            "--ca",
            str(folder / "made/ca.crt"),
            "--runs",
            str(runs),
        ),
        *(
            "federation=folder",
            "federation.centres=[north]",
            "federation.join_timeout=20",
            "stage.rounds=1",
            "preprocess.image_size=32",
        ),
        root=other,
        timeout=600,
    )
    assert ran.returncode == 2
    assert "code" in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    assert not spoken.exists()


def test_who_is_refused(federation: tuple[p.Started, Path, str, str, Path], tmp_path: Path) -> None:
    """A stranger's key; a key that was revoked; a coordinator with another authority's certificate; and of the SuperLink all but the Fleet paths."""
    processes, folder, address, operator, runs = federation
    authority = str(folder / "made" / "ca.crt")

    stranger = tmp_path / "stranger"
    assert p.centre("key", str(stranger)).returncode == 0
    node = p.start_centre(processes, folder / "hospitals" / "north", address, stranger, name="stranger")
    assert node.wait(180) != 0
    assert "exit code" in processes.log("stranger").lower(), processes.log("stranger")[-1500:]

    processes.stop("south")
    revoked = p.server(
        "provision", str(folder / "federation.yaml"), "--out", str(folder / "made"), "--revoke", "south"
    )
    assert revoked.returncode == 0, revoked.stderr
    told = p.server(
        "admit", str(folder / "made/coordinator/centres"), "--superlink", operator, "--ca", authority
    )
    assert "south: let in no more" in told.stdout, told.stdout + told.stderr
    node = p.start_centre(processes, folder / "hospitals" / "south", address)
    assert node.wait(180) != 0
    seen = p.server(
        "doctor",
        "--superlink",
        operator,
        "--ca",
        authority,
        "--centres",
        str(folder / "made/coordinator/centres"),
        "--runs",
        str(runs),
    )
    assert "node " not in seen.stdout, seen.stdout  # neither of the two is known to the SuperLink
    assert "south" not in seen.stdout

    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"address": address, "centres": {"north": {}}}))
    assert (
        p.server("provision", str(tmp_path / "other.yaml"), "--out", str(tmp_path / "other")).returncode == 0
    )
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"https://{address}/health", verify=str(tmp_path / "other" / "ca.crt"), trust_env=False)

    if "nginx" in processes.processes:
        for path in (
            "/v1/control/list-runs",
            "/v1/runtime/acquire-task",
            "/openapi.json",
            "/docs",
            "/",
            "/v1/fleet/../control/list-runs",
        ):
            assert (
                httpx.post(f"https://{address}{path}", verify=authority, trust_env=False).status_code == 404
            ), path
        assert (
            httpx.post(
                f"https://{operator}/v1/control/list-runs", verify=authority, trust_env=False
            ).status_code
            != 404
        )
        assert httpx.post(
            f"https://{address}/v1/fleet/pull-messages", verify=authority, trust_env=False
        ).status_code in (400, 401, 415)

    (tmp_path / "guess").write_text("guess")
    p.start_superexec(processes, folder / "made", tmp_path / "guess", operator, tmp_path, name="thief")
    refused = "SuperExec authentication failed"
    p.wait_until("the stranger's SuperExec is refused", 120, lambda: refused in processes.log("superlink"))
