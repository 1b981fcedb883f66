"""What is shipped as files: Compose and Kubernetes by their schemas, the hardening that deploy/README.md promises, nginx by nginx."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from server.operations.federation_file import load_federation_file
from server.operations.provision import provision_federation
from server.operations.site_kits import build_coordinator_files, build_kit_files

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE = sorted(DEPLOY.glob("compose.*.yaml"))
MANIFESTS = [
    (p.name, m)
    for p in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for m in yaml.safe_load_all(p.read_text())
]


def test_compose_by_schema() -> None:
    """Also that the schema is looked at: the same check refuses a misspelt key."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*check, *map(str, COMPOSE)], capture_output=True).returncode == 0
    wrong = COMPOSE[0].read_text().replace("read_only:", "readonly:")
    assert subprocess.run([*check, "-"], input=wrong, capture_output=True, text=True).returncode == 1


@pytest.mark.parametrize("service", ["centre", "proxy", "superlink", "superexec", "dashboard", "postgres"])
def test_every_container_is_confined(service: str) -> None:
    """Not root, read-only, no capabilities, no new privileges; and of a hospital's container no port is published."""
    services = {
        k: v
        for p in COMPOSE
        if "gpu" not in p.name
        for k, v in yaml.safe_load(p.read_text())["services"].items()
    }
    settings = services[service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["user"] == "${CONSILIUM_USER:-10001:10001}"
    published = [str(p) for p in settings.get("ports", [])]
    if service != "proxy":
        assert all(p.startswith("127.0.0.1:") for p in published)
    assert bool(published) is (service in ("proxy", "superlink", "dashboard"))


@pytest.mark.parametrize(
    ("file", "manifest"),
    MANIFESTS,
    ids=lambda m: m if isinstance(m, str) else f"{m['kind']}-{m['metadata']['name']}",
)
def test_kubernetes_by_schema(file: str, manifest: dict[str, object]) -> None:
    kubernetes_validate.validate(manifest, "1.33", strict=True)
    for pod in [manifest["spec"]["template"]["spec"]] if "template" in manifest["spec"] else []:  # type: ignore[index, operator]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            confined = {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["securityContext"] == confined, file


def test_the_console_is_the_same_in_both() -> None:
    """In Kubernetes it has the command of the Compose stack, the same folder of runs and ledger, and a way to SuperLink and ledger."""
    service = yaml.safe_load((DEPLOY / "compose.coordinator.yaml").read_text())["services"]["dashboard"]
    manifests = {
        (m["kind"], m["metadata"]["name"]): m["spec"] for name, m in MANIFESTS if name == "coordinator.yaml"
    }
    pod = manifests["Deployment", "dashboard"]["template"]
    [container] = pod["spec"]["containers"]
    assert [
        word.replace("/etc/consilium/server.key", "/run/secrets/server.key") for word in container["command"]
    ] == service["command"]
    settings = {of["name"]: of["value"] for of in container["env"] if of["name"] != "PGPASSFILE"}
    assert settings.items() <= service["environment"].items()
    for part in ("superlink", "postgres"):
        [rule] = manifests["NetworkPolicy", part]["ingress"]
        assert {"podSelector": {"matchLabels": pod["metadata"]["labels"]}} in rule["from"]


def test_images_fix_what_flower_would_do_by_itself() -> None:
    for name in ("client", "server"):
        text = (DEPLOY / f"{name}.Dockerfile").read_text()
        for setting in (
            "FLWR_TELEMETRY_ENABLED=0",
            "FLWR_DISABLE_UPDATE_CHECK=1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
        ):
            assert setting in text
        assert "\nUSER 10001:10001\n" in text
        assert "\nHEALTHCHECK " in text


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "federation.yaml").write_text(
        "address: localhost:8443\ncentres: {north: {}, south: {device: cpu}}\n"
    )
    list(provision_federation(tmp_path / "federation.yaml", tmp_path / "made"))
    return tmp_path


def test_a_kit_is_whole(made: Path) -> None:
    """All that its compose file mounts is in it; every ${...} it needs is in settings.env or written by ./start; the script is a shell script."""
    federation = load_federation_file(made / "federation.yaml")
    files = build_kit_files(federation, "north", b"key", b"ca")
    compose = yaml.safe_load(files["compose.yaml"])
    mounted = [v.split(":")[0] for v in compose["services"]["centre"]["volumes"]] + [
        compose["secrets"]["key"]["file"]
    ]
    assert {m.removeprefix("./") for m in mounted if m.startswith("./")} <= set(files)
    for name in ("CONSILIUM_IMAGE", "CONSILIUM_COORDINATOR", "CONSILIUM_DATA", "CONSILIUM_STATE"):
        assert f"\n{name}=" in files["settings.env"].decode()
    assert "COMPOSE_FILE=compose.yaml:compose.gpu.yaml\n" in files["settings.env"].decode()
    assert (
        "COMPOSE_FILE=compose.yaml\n"
        in build_kit_files(federation, "south", None, b"ca")["settings.env"].decode()
    )
    assert subprocess.run(["sh", "-n"], input=files["start"], check=False).returncode == 0
    assert b"$" not in files["README.md"]
    coordinator = yaml.safe_load(build_coordinator_files(federation)["compose.yaml"])
    mounted = [
        v.split(":")[0]
        for s in coordinator["services"].values()
        for v in s.get("volumes", [])
        if v.startswith("./")
    ]
    mounted += [s["file"] for s in coordinator["secrets"].values()]
    assert all((made / "made" / "coordinator" / m).exists() for m in mounted)


def test_a_kits_settings_are_its_files_whatever_the_shell_has(made: Path) -> None:
    kit, seen = made / "kit", made / "seen"
    kit.mkdir()
    for name, content in build_kit_files(
        load_federation_file(made / "federation.yaml"), "south", b"key", b"ca"
    ).items():
        (kit / name).write_bytes(content)
    settings = (kit / "settings.env").read_text()
    (kit / "settings.env").write_text(
        re.sub("(?m)^CONSILIUM_STATE=.*", f"CONSILIUM_STATE={made}/state", settings)
    )
    (made / "docker").write_text(f"#!/bin/sh\nenv > {seen}\n")  # notes what it is called with
    (made / "docker").chmod(0o755)
    other = {"PATH": f"{made}:{os.environ['PATH']}", "CONSILIUM_DATA": "/elsewhere", "CONSILIUM_LOG": "text"}
    subprocess.run(["sh", str(kit / "start")], env=other, check=True)
    assert "/elsewhere" not in seen.read_text()
    assert "CONSILIUM_LOG=text" in seen.read_text()  # not in the file: the shell's
    assert "COMPOSE_FILE=compose.yaml\n" in seen.read_text()


@pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx here: apt-get install nginx-light")
def test_nginx_takes_its_configuration(made: Path) -> None:
    conf = made / "made" / "coordinator" / "nginx.conf"
    conf.write_text(conf.read_text().replace("superlink:8000", "127.0.0.1:8000").replace("/tmp/", f"{made}/"))
    tested = subprocess.run(["nginx", "-t", "-c", str(conf)], capture_output=True, text=True)
    assert tested.returncode == 0, tested.stderr
