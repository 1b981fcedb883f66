"""What goes wrong when a federation is provisioned: crashes, mixed-up keys, names that YAML changes."""

from __future__ import annotations

import datetime as dt
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from client.site.config import parse_site
from common.utils.errors import ConsiliumError
from common.utils.node_keys import extract_public_key, generate_key
from server.operations import certificate_authority
from server.operations.certificate_authority import is_authority, make_authority, read_certificate
from server.operations.federation_file import load_federation_file
from server.operations.provision import provision_federation, revoke_centre
from server.operations.provision_checks import check_provisioning
from server.operations.superlink import read_enrolled_keys, sync_nodes

TWO_CENTRES = "address: consilium.example.org:443\ncentres: {north: {}, south: {device: cpu}}\n"


def write_federation_file(folder: Path, text: str = TWO_CENTRES) -> Path:
    path = folder / "federation.yaml"
    path.write_text(text)
    return path


def list_faults(federation_file: Path, folder: Path) -> list[str]:
    return [
        result.message for result in check_provisioning(federation_file, folder) if result.level == "fault"
    ]


# --- keys of centres


def test_revoking_the_only_centre_reaches_the_superlink(tmp_path: Path) -> None:
    """A folder without any key is refused unless the last one was revoked: it might be the wrong folder."""
    federation_file = write_federation_file(tmp_path, "address: h:443\ncentres: {north: {}}\n")
    list(provision_federation(federation_file, tmp_path))
    centres = tmp_path / "coordinator" / "centres"
    assert list(read_enrolled_keys(centres).values()) == ["north"]
    revoke_centre(tmp_path, "north")
    assert read_enrolled_keys(centres) == {}
    with pytest.raises(ConsiliumError, match="cannot be reached"):  # it is asked, and there is none here
        list(sync_nodes(centres, "127.0.0.1:1", tmp_path / "ca.crt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConsiliumError, match="holds no centre's public key"):
        read_enrolled_keys(tmp_path / "empty")


def test_two_centres_with_one_key_are_refused(tmp_path: Path) -> None:
    """By provisioning, by the check and where the keys are registered."""
    generate_key(tmp_path / "key")
    (tmp_path / "key.pub").write_text(extract_public_key(tmp_path / "key") + "\n")
    entry = "{public_key: key.pub}"
    text = f"address: h:443\ncentres: {{north: {entry}, south: {entry}}}\n"
    federation_file = write_federation_file(tmp_path, text)
    with pytest.raises(ConsiliumError, match="is the key of north"):
        list(provision_federation(federation_file, tmp_path / "out"))
    centres = tmp_path / "out" / "coordinator" / "centres"
    shutil.copyfile(centres / "north.pub", centres / "south.pub")
    assert list_faults(federation_file, tmp_path / "out") == ["north and south have one key"]
    with pytest.raises(ConsiliumError, match="north and south have one key"):
        read_enrolled_keys(centres)


# --- the coordinator's certificate


def test_check_finds_a_key_of_another_certificate(tmp_path: Path) -> None:
    federation_file = write_federation_file(tmp_path)
    for name in ("out", "other"):
        list(provision_federation(federation_file, tmp_path / name))
    assert list_faults(federation_file, tmp_path / "out") == []
    shutil.copyfile(tmp_path / "other/coordinator/server.key", tmp_path / "out/coordinator/server.key")
    assert list_faults(federation_file, tmp_path / "out") == [
        "server.key is missing, or is not the key of server.crt"
    ]
    (tmp_path / "out/coordinator/server.key").unlink()
    shutil.copyfile(tmp_path / "other/ca.key", tmp_path / "out/ca.key")
    assert list_faults(federation_file, tmp_path / "out") == [
        "ca.key is not the key of ca.crt",
        "server.key is missing, or is not the key of server.crt",
    ]


def test_server_certificate_cannot_sign_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had its key could be any host to the hospitals."""
    federation_file = write_federation_file(tmp_path)
    list(provision_federation(federation_file, tmp_path))
    certificate = read_certificate(tmp_path / "coordinator/server.crt")
    assert not is_authority(certificate)
    assert is_authority(read_certificate(tmp_path / "ca.crt"))
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    monkeypatch.setattr(
        "server.operations.certificate_authority.x509.BasicConstraints",
        lambda ca, path_length: x509.extensions.BasicConstraints(ca=True, path_length=0),
    )
    list(provision_federation(federation_file, tmp_path, reissue="coordinator"))
    monkeypatch.undo()
    (fault,) = list_faults(federation_file, tmp_path)
    assert "could sign others" in fault


def test_check_finds_an_expired_certificate_and_a_missing_name(tmp_path: Path) -> None:
    federation_file = write_federation_file(tmp_path)
    list(provision_federation(federation_file, tmp_path))
    with_name = write_federation_file(tmp_path, TWO_CENTRES + "sans: [other.example.org]\n")
    assert list_faults(with_name, tmp_path) == [
        "server.crt is not for other.example.org, which federation.yaml names"
    ]
    real_builder = certificate_authority._certificate_builder
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            certificate_authority,
            "_certificate_builder",
            lambda *arguments: _set_end(real_builder(*arguments), now - dt.timedelta(minutes=1)),
        )
        list(provision_federation(federation_file, tmp_path, reissue="coordinator"))
    (fault,) = list_faults(federation_file, tmp_path)
    assert fault.startswith("server.crt expired on")


def _set_end(builder: x509.CertificateBuilder, end: dt.datetime) -> x509.CertificateBuilder:
    builder._not_valid_after = end.replace(tzinfo=None)
    return builder


@pytest.mark.parametrize(
    "name",
    [
        "ca.key",
        "coordinator/server.key",
        "coordinator/superexec.secret",
        "coordinator/postgres.password",
        "coordinator/pgpass",
        "keys/north",
        "kits/south.tar.gz",
    ],
)
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_check_finds_a_secret_that_others_can_use(tmp_path: Path, name: str, mode: int) -> None:
    federation_file = write_federation_file(tmp_path)
    list(provision_federation(federation_file, tmp_path))
    (tmp_path / name).chmod(mode)
    assert list_faults(federation_file, tmp_path) == [f"{tmp_path / name} can be read by others"]


# --- interrupted provisioning


@pytest.mark.parametrize("name", ["ca.crt", "coordinator/server.crt", "coordinator/centres/north.pub"])
def test_provisioning_goes_on_after_a_crash_between_a_key_and_its_certificate(
    tmp_path: Path, name: str
) -> None:
    """The key that is there is used: others may have its public part already."""
    federation_file = write_federation_file(tmp_path)
    if name == "ca.crt":
        make_authority(tmp_path, "consilium")  # the crash is before anything else
    else:
        list(provision_federation(federation_file, tmp_path))
    keys = {path: path.read_bytes() for path in (tmp_path / "ca.key", *tmp_path.glob("*/server.key"))}
    (tmp_path / name).unlink()
    list(provision_federation(federation_file, tmp_path))
    assert {path: path.read_bytes() for path in keys} == keys
    assert list_faults(federation_file, tmp_path) == []


def test_a_secret_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash before the rename leaves no file that blocks the next attempt."""

    def crash(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            generate_key(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []
    generate_key(tmp_path / "key")
    with pytest.raises(ConsiliumError, match="never overwritten"):
        generate_key(tmp_path / "key")


# --- names


@pytest.mark.parametrize("name", ["no", "1.10", "012", "null", "true", "1e3", "0x1F", "2026-01-01", "off"])
def test_a_kit_names_its_centre_whatever_yaml_makes_of_the_word(tmp_path: Path, name: str) -> None:
    federation_file = write_federation_file(tmp_path, f'address: h:443\ncentres: {{"{name}": {{}}}}\n')
    list(provision_federation(federation_file, tmp_path))
    with tarfile.open(tmp_path / "kits" / f"{name}.tar.gz") as kit:
        kit.extractall(tmp_path / "kit", filter="data")
    site_file = tmp_path / "kit" / name / "site.yaml"
    assert yaml.safe_load(site_file.read_text())["centre"] == name
    assert parse_site({"site": str(site_file)}).centre == name


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("centres: {no: {}}", "put it in quotes"),
        ("centres: {012: {}}", "put it in quotes"),
        ("centres: {null: {}}", "put it in quotes"),
        ("centres: {north: {}}\nname: 1.10", "put it in quotes"),
        ('centres: {north: {data: "/srv\\nCONSILIUM_IMAGE=x"}}', "must be an absolute path"),
        ("centres: {north: {state: /srv/$HOME}}", "must be an absolute path"),
        ("centres: {north: {device: 'cpu # x'}}", "must be auto, cpu, cuda"),
        ('centres: {north: {}}\nimage: "x\\ny"', "must be a container image"),
    ],
)
def test_a_value_that_would_become_another_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConsiliumError, match=sentence):
        load_federation_file(write_federation_file(tmp_path, f"address: h:443\n{text}\n"))
