"""Site kits.

Nothing secret where it does not belong, nothing replaced unasked, and what was made is what OpenSSL and
OpenSSH understand.
"""

from __future__ import annotations

import datetime as dt
import io
import shutil
import ssl
import subprocess
import tarfile
from pathlib import Path

import pytest

from common.utils.errors import ConsiliumError
from common.utils.node_keys import extract_public_key, generate_key
from server.operations.certificate_authority import check_certificate_expiry, make_authority, make_certificate
from server.operations.federation_file import load_federation_file
from server.operations.provision import provision_federation, revoke_centre
from server.operations.provision_checks import check_provisioning

YAML = "address: consilium.example.org:443\nsans: [10.0.0.5]\ncentres: {north: {}, south: {device: cpu}}\n"


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    (tmp_path / "federation.yaml").write_text(YAML)
    return tmp_path / "federation.yaml"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_existing_keys_and_secrets_are_kept(yaml: Path, tmp_path: Path) -> None:
    """A second run changes no byte.

    Private files are 0600, on disk and in the kit; a kit holds its own centre's key and nobody else's.
    """
    out = tmp_path / "out"
    said = "\n".join(provision_federation(yaml, out))
    first = contents(out)
    assert list(provision_federation(yaml, out)) == []
    assert contents(out) == first
    for name, content in first.items():
        private = (
            name.startswith(("keys/", "kits/"))
            or Path(name).suffix in (".key", ".secret", ".password")
            or name.endswith("pgpass")
        )
        assert oct((out / name).stat().st_mode & 0o777) == ("0o600" if private else "0o644"), name
        if private and not name.startswith("kits/"):
            assert content.decode() not in said
            assert not any(
                content in other for key, other in first.items() if key != name and not key.endswith("pgpass")
            )
    with tarfile.open(out / "kits" / "north.tar.gz") as kit:
        members = {m.name: m for m in kit.getmembers()}
        assert list(members) == sorted(members)
        assert {(m.mtime, m.uid, m.gid) for m in members.values()} == {(0, 0, 0)}
        assert members["north/key"].mode == 0o600
        inside = b"".join(kit.extractfile(m).read() for m in members.values())  # type: ignore[union-attr]
    assert first["keys/north"] in inside
    assert first["keys/south"] not in inside
    assert first["ca.key"] not in inside


def test_kit_is_reproducible_byte_for_byte(yaml: Path, tmp_path: Path) -> None:
    """From the same keys, another day and in another folder."""
    list(provision_federation(yaml, tmp_path / "out"))
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "kits")
    list(provision_federation(yaml, tmp_path / "again"))
    assert (tmp_path / "out/kits/north.tar.gz").read_bytes() == (
        tmp_path / "again/kits/north.tar.gz"
    ).read_bytes()


def test_openssl_and_openssh_accept_the_certificates_and_keys(yaml: Path, tmp_path: Path) -> None:
    """A TLS handshake by the system's OpenSSL for each name, none for another.

    Ssh-keygen derives the enrolled public key from the private one.
    """
    out = tmp_path / "out"
    list(provision_federation(yaml, out))
    for host, good in {
        "consilium.example.org": True,
        "10.0.0.5": True,
        "superlink": True,
        "evil.example.org": False,
    }.items():
        assert handshake(out, out / "ca.crt", host) is good, host
    list(provision_federation(yaml, tmp_path / "other"))
    assert handshake(out, tmp_path / "other" / "ca.crt", "superlink") is False
    verified = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", out / "ca.crt", out / "coordinator/server.crt"],
        capture_output=True,
    )
    assert verified.returncode == 0, verified
    if not shutil.which("ssh-keygen"):
        pytest.skip("no ssh-keygen here")
    derived = subprocess.run(
        ["ssh-keygen", "-y", "-f", out / "keys" / "north"], capture_output=True, text=True, check=True
    ).stdout
    assert derived.split()[:2] == (out / "coordinator/centres/north.pub").read_text().split()[:2]


def handshake(made: Path, authority: Path, host: str) -> bool:
    """Whether a client that trusts `authority` accepts the coordinator as `host`, in memory."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(made / "coordinator/server.crt", made / "coordinator/server.key")
    client.load_verify_locations(authority)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    open_ends = list(ends)
    for _ in range(10):
        for end in list(open_ends):
            try:
                end.do_handshake()
                open_ends.remove(end)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return not open_ends


def test_revoked_centre_is_admitted_again_with_a_new_key(yaml: Path, tmp_path: Path) -> None:
    """One centre's key changes; nobody else's anything does."""
    out = tmp_path / "out"
    list(provision_federation(yaml, out))
    before = contents(out)
    revoke_centre(out, "north")
    assert not [name for name in contents(out) if "north" in name and not name.startswith("revoked/")]
    assert any("revoked" in sentence for sentence in provision_federation(yaml, out))
    assert not (out / "keys" / "north").exists()
    assert [f.level for f in check_provisioning(yaml, out)].count("warning") == 1
    list(provision_federation(yaml, out, reissue="north"))
    after = contents(out)
    assert after["keys/north"] != before["keys/north"]
    changed = {name for name in before if after.get(name) != before[name]}
    assert changed == {"keys/north", "kits/north.tar.gz", "coordinator/centres/north.pub"}
    with pytest.raises(ConsiliumError, match="did you mean 'north'"):
        revoke_centre(out, "nort")
    with pytest.raises(ConsiliumError, match="did you mean 'south'"):
        list(provision_federation(yaml, out, reissue="souht"))


def test_coordinator_certificate_is_reissued(yaml: Path, tmp_path: Path) -> None:
    """A new certificate is by the same authority, so that no kit changes.

    A new name in the file is a fault until then.
    """
    out = tmp_path / "out"
    list(provision_federation(yaml, out))
    kits = contents(out / "kits")
    yaml.write_text(YAML.replace("[10.0.0.5]", "[10.0.0.6]"))
    assert any("kept" in s or "differ" in s for s in provision_federation(yaml, out)) is False
    assert [f.message for f in check_provisioning(yaml, out) if f.level == "fault"] == [
        "server.crt is not for 10.0.0.6, which federation.yaml names"
    ]
    (out / "ca.key").rename(tmp_path / "ca.key")  # on its disk in the safe
    with pytest.raises(ConsiliumError, match="bring it back"):
        list(provision_federation(yaml, out, reissue="coordinator"))
    assert handshake(out, out / "ca.crt", "10.0.0.5")  # the old one is still there
    (tmp_path / "ca.key").rename(out / "ca.key")
    list(provision_federation(yaml, out, reissue="coordinator"))
    assert handshake(out, out / "ca.crt", "10.0.0.6")
    assert contents(out / "kits") == kits
    assert "fault" not in {f.level for f in check_provisioning(yaml, out)}


def test_centre_may_make_its_own_key(tmp_path: Path) -> None:
    """Its private key is nowhere at the coordinator's, a private one sent by mistake is refused, and so is a
    second one unasked or a revoked one.
    """
    own = tmp_path / "own"
    generate_key(own)
    (tmp_path / "own.pub").write_text(extract_public_key(own) + "\n")
    yaml = tmp_path / "federation.yaml"
    yaml.write_text("address: h:443\ncentres: {west: {public_key: own.pub}}\n")
    out = tmp_path / "out"
    list(provision_federation(yaml, out))
    assert not (out / "keys").exists()
    with tarfile.open(fileobj=io.BytesIO((out / "kits" / "west.tar.gz").read_bytes())) as kit:
        assert "west/key" not in kit.getnames()
    with pytest.raises(ConsiliumError, match="never overwritten"):
        generate_key(own)
    generate_key(tmp_path / "second")
    (tmp_path / "own.pub").write_text(extract_public_key(tmp_path / "second") + "\n")
    with pytest.raises(ConsiliumError, match="--reissue west"):
        list(provision_federation(yaml, out))
    assert (out / "coordinator/centres/west.pub").exists()
    (tmp_path / "own.pub").write_text(extract_public_key(own) + "\n")
    with pytest.raises(ConsiliumError, match="has already"):
        list(provision_federation(yaml, out, reissue="west"))
    assert (out / "coordinator/centres/west.pub").exists()
    revoke_centre(out, "west")
    with pytest.raises(ConsiliumError, match="revoked key of west"):
        list(provision_federation(yaml, out, reissue="west"))
    (tmp_path / "own.pub").write_bytes(own.read_bytes())
    with pytest.raises(ConsiliumError, match="private key, which must not leave"):
        list(provision_federation(yaml, out, reissue="west"))


def test_expiry_is_reported_in_advance(tmp_path: Path) -> None:
    """Certificates of 400, 20 and no days; OpenSSL agrees about the last."""
    make_authority(tmp_path, "test")
    for days, level in {400: "ok", 20: "warning", 0: "fault"}.items():
        folder = tmp_path / str(days)
        make_certificate(folder, tmp_path, "h", [], days)
        found = check_certificate_expiry(folder / "server.crt", 45, "renew")
        assert found.level == level
        assert f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=days):%Y-%m-%d}" in found.message
    assert (
        subprocess.run(
            ["openssl", "x509", "-checkend", "0", "-noout", "-in", folder / "server.crt"], capture_output=True
        ).returncode
        == 1
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("centres: {north: {}}", "address"),
        ("address: h\ncentres: {north: {}}", "host:port"),
        ("address: h:443\ncentres: {}", "names no centre"),
        ("address: h:443\ncentres: {../x: {}}", "cannot be a name"),
        ("address: h:443\ncentres: {coordinator: {}}", "cannot be a name"),
        ("address: h:443\ncentres: {north: {devise: cpu}}", "did you mean 'device'"),
        ("address: h:443\nadress: x\ncentres: {north: {}}", "did you mean 'address'"),
        ("address: [", "not valid YAML"),
    ],
)
def test_invalid_federation_file_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(ConsiliumError, match=sentence) as raised:
        load_federation_file(tmp_path / "f.yaml")
    assert "f.yaml" in str(raised.value)
