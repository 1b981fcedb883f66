"""The files that are shipped: Compose and Kubernetes by their schemas, hardening, kits, nginx by nginx."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.operations.federation_file import load_federation_file
from server.operations.provision import provision_federation
from server.operations.site_kits import build_coordinator_files, build_kit_files

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE_FILES = sorted(DEPLOY.glob("compose.*.yaml"))
CONFINED_POD = {
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}


def load_manifests() -> list[tuple[str, dict[str, Any]]]:
    """Return (file name, Kubernetes manifest) of everything that is shipped."""
    manifests = []
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            manifests.append((path.name, manifest))
    return manifests


MANIFESTS = load_manifests()


def load_services(path: Path) -> dict[str, dict[str, Any]]:
    """Return the services of a Compose file."""
    services: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())["services"]
    return services


def test_compose_files_match_their_schema() -> None:
    """The same check refuses a misspelt key, so the schema is really applied."""
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*check, *map(str, COMPOSE_FILES)], capture_output=True).returncode == 0
    wrong = COMPOSE_FILES[0].read_text().replace("read_only:", "readonly:")
    assert subprocess.run([*check, "-"], input=wrong, capture_output=True, text=True).returncode == 1


@pytest.mark.parametrize("service", ["centre", "proxy", "superlink", "superexec", "dashboard", "postgres"])
def test_every_container_is_confined(service: str) -> None:
    """Not root, read-only, no capabilities, no new privileges; a hospital's container publishes no port."""
    services = {}
    for path in COMPOSE_FILES:
        if "gpu" not in path.name:
            services |= load_services(path)
    settings = services[service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["user"] == "${CONSILIUM_USER:-10001:10001}"
    published = [str(port) for port in settings.get("ports", [])]
    if service != "proxy":
        assert all(port.startswith("127.0.0.1:") for port in published)
    assert bool(published) is (service in ("proxy", "superlink", "dashboard"))


def name_case(value: str | dict[str, Any]) -> str:
    """Return a test case's id: a file name, or a manifest's kind and name."""
    return value if isinstance(value, str) else f"{value['kind']}-{value['metadata']['name']}"


@pytest.mark.parametrize(("file", "manifest"), MANIFESTS, ids=name_case)
def test_kubernetes_manifest_matches_its_schema_and_is_confined(file: str, manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.33", strict=True)
    if "template" not in manifest["spec"]:
        return
    pod = manifest["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        assert container["securityContext"] == CONFINED_POD, file


def test_console_is_the_same_in_compose_and_kubernetes() -> None:
    """Both have the same command, folder of runs and ledger, and a way to SuperLink and ledger."""
    service = load_services(DEPLOY / "compose.coordinator.yaml")["dashboard"]
    specs = {}
    for file, manifest in MANIFESTS:
        if file == "coordinator.yaml":
            specs[manifest["kind"], manifest["metadata"]["name"]] = manifest["spec"]
    pod = specs["Deployment", "dashboard"]["template"]
    [container] = pod["spec"]["containers"]
    command = []
    for word in container["command"]:
        command.append(word.replace("/etc/consilium/server.key", "/run/secrets/server.key"))
    assert command == service["command"]
    settings = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"] != "PGPASSFILE"}
    assert settings.items() <= service["environment"].items()
    for name in ("superlink", "postgres"):
        [rule] = specs["NetworkPolicy", name]["ingress"]
        assert {"podSelector": {"matchLabels": pod["metadata"]["labels"]}} in rule["from"]


def test_images_turn_off_flower_telemetry_updates_and_installations() -> None:
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
def folder(tmp_path: Path) -> Path:
    """A folder with federation.yaml, and in `made` what `provision` wrote from it."""
    (tmp_path / "federation.yaml").write_text(
        "address: localhost:8443\ncentres: {north: {}, south: {device: cpu}}\n"
    )
    list(provision_federation(tmp_path / "federation.yaml", tmp_path / "made"))
    return tmp_path


def test_kit_has_every_file_that_it_mounts(folder: Path) -> None:
    """Every variable that it needs is in settings.env, and ./start is a valid shell script."""
    federation = load_federation_file(folder / "federation.yaml")
    files = build_kit_files(federation, "north", b"key", b"ca")
    compose = yaml.safe_load(files["compose.yaml"])
    sources = [volume.split(":")[0] for volume in compose["services"]["centre"]["volumes"]]
    sources.append(compose["secrets"]["key"]["file"])
    local_files = {source.removeprefix("./") for source in sources if source.startswith("./")}
    assert local_files <= set(files)
    settings = files["settings.env"].decode()
    for name in ("CONSILIUM_IMAGE", "CONSILIUM_COORDINATOR", "CONSILIUM_DATA", "CONSILIUM_STATE"):
        assert f"\n{name}=" in settings
    assert "COMPOSE_FILE=compose.yaml:compose.gpu.yaml\n" in settings
    cpu_kit = build_kit_files(federation, "south", None, b"ca")
    assert "COMPOSE_FILE=compose.yaml\n" in cpu_kit["settings.env"].decode()
    assert subprocess.run(["sh", "-n"], input=files["start"], check=False).returncode == 0
    assert b"$" not in files["README.md"]


def test_coordinator_has_every_file_that_it_mounts(folder: Path) -> None:
    federation = load_federation_file(folder / "federation.yaml")
    compose = yaml.safe_load(build_coordinator_files(federation)["compose.yaml"])
    sources = [secret["file"] for secret in compose["secrets"].values()]
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                sources.append(volume.split(":")[0])
    for source in sources:
        assert (folder / "made" / "coordinator" / source).exists(), source


def test_kit_settings_win_over_the_shells_variables(folder: Path) -> None:
    kit = folder / "kit"
    recorded = folder / "recorded"
    kit.mkdir()
    federation = load_federation_file(folder / "federation.yaml")
    for name, content in build_kit_files(federation, "south", b"key", b"ca").items():
        (kit / name).write_bytes(content)
    settings = (kit / "settings.env").read_text()
    settings = re.sub("(?m)^CONSILIUM_STATE=.*", f"CONSILIUM_STATE={folder}/state", settings)
    (kit / "settings.env").write_text(settings)
    fake_docker = folder / "docker"  # records the environment that it gets
    fake_docker.write_text(f"#!/bin/sh\nenv > {recorded}\n")
    fake_docker.chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CONSILIUM_DATA": "/elsewhere",
        "CONSILIUM_LOG": "text",
    }
    subprocess.run(["sh", str(kit / "start")], env=environment, check=True)
    assert "/elsewhere" not in recorded.read_text()
    assert "CONSILIUM_LOG=text" in recorded.read_text()  # is not in the file, so the shell's counts
    assert "COMPOSE_FILE=compose.yaml\n" in recorded.read_text()


@pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx here: apt-get install nginx-light")
def test_nginx_accepts_its_configuration(folder: Path) -> None:
    path = folder / "made" / "coordinator" / "nginx.conf"
    text = path.read_text().replace("superlink:8000", "127.0.0.1:8000").replace("/tmp/", f"{folder}/")
    path.write_text(text)
    check = subprocess.run(["nginx", "-t", "-c", str(path)], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
