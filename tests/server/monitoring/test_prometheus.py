"""What Prometheus sees: the samples of a ledger with all in it, and the shipped alerts and dashboard in a real Prometheus."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from common.config.compose import compose_config, config_to_dict
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.monitoring.health import SuperLinkNode
from server.monitoring.prometheus import ConsiliumCollector, render_metrics

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
NOW = datetime.now(UTC)
NODES = [SuperLinkNode("north", True, NOW, NOW), SuperLinkNode("south", False, NOW, NOW)]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A run of two rounds and two centres: the second one's AUC is undefined, its budget nearly spent, its last contribution left out."""
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('ledger')}/ledger.db")
    config = config_to_dict(
        compose_config(["federation.centres=[north,south]", "federation.round_timeout=600"])
    )
    ledger.add_run("old", recipe="multisource", mode="federated", config=config, code="f")
    ledger.log_event("old", "finished")
    ledger.add_run("r", recipe="multisource", mode="federated", config=config, code="f")
    for centre in ("north", "south"):
        facts = {
            "scans": {"train": 80, "val": 20},
            "skipped": {"it is not there": 2},
            "policy": {"epsilon": 4.0},
            "sources": [centre],
        }
        ledger.add_centre("r", centre, facts)
    for number in (1, 2):
        used = {"accepted": True, "scans": 80, "bytes_up": 1000, "bytes_down": 3000}
        contributions = {
            "north": used | {"epsilon": 1.0},
            "south": used | {"epsilon": 3.7 * number / 2, "accepted": number == 1},
        }
        centres = {
            "north": {"auc": 0.9, "f1": 0.8},
            "south": {"auc": None, "reasons": {"auc": "one class only"}},
        }
        scores = {
            "covid": {
                "centres": centres,
                "macro": {"auc": 0.9},
                "worst": {"auc": {"value": 0.9, "centre": "north"}},
            }
        }
        weights = {"backbone": {"north": 0.25, "south": 0.75}}
        ledger.add_round(
            "r", "main", number, started=NOW, seconds=12.5, closed_because="all replied",
            contributions=contributions, weights=weights, scores=scores,
        )  # fmt: skip
    return ledger


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(text.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_the_samples_say_what_the_ledger_says(ledger: Ledger) -> None:
    found = samples(render_metrics(ledger, lambda: NODES, {"coordinator": NOW + timedelta(days=9)}))

    def of(name: str, **labels: str) -> float | None:
        return found.get((f"consilium_{name}", frozenset(labels.items())))

    assert (of("centre_up", centre="north"), of("centre_up", centre="south")) == (1, 0)
    assert of("centre_state", centre="south", state="offline") == 1
    assert of("centre_scans", centre="north", split="train") == 80
    assert of("centre_scans_unreadable", centre="north") == 2
    assert of("centre_sent_bytes_total", run="r", centre="north") == 2000
    assert of("contributions_total", run="r", centre="south", outcome="left_out") == 1
    assert of("centre_privacy_epsilon", run="r", centre="south") == 1.85  # of the last one that was used
    assert of("centre_privacy_epsilon_limit", centre="south") == 4
    assert of("run_round", run="r", stage="main") == 2
    assert of("centre_weight", run="r", centre="south") == 0.75
    assert of("effective_centres", run="r", part="backbone") == pytest.approx(1 / (0.25**2 + 0.75**2))
    assert of("centre_score", run="r", task="covid", centre="north", metric="auc") == 0.9
    assert (
        of("centre_score", run="r", task="covid", centre="south", metric="auc") is None
    )  # undefined, and no number
    assert of("score", run="r", task="covid", view="worst", metric="auc") == 0.9
    assert (
        of("certificate_expiry_timestamp_seconds", certificate="coordinator")
        == (NOW + timedelta(days=9)).timestamp()
    )
    assert of("runs", status="finished") == 1
    assert not any(
        "old" in dict(labels).values() for _, labels in found
    )  # a run that has ended is not shown for ever


def test_what_watches_does_not_break(ledger: Ledger, tmp_path: Path) -> None:
    def away() -> list[SuperLinkNode]:
        raise ConsiliumError("the SuperLink cannot be reached")

    assert samples(render_metrics(ledger, away))["consilium_superlink_up", frozenset()] == 0
    broken = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    broken.was_connected = False  # no patience
    broken._engine.dispose()
    (tmp_path / "ledger.db").write_bytes(b"nonsense" * 1000)
    assert samples(render_metrics(broken))["consilium_ledger_up", frozenset()] == 0


@pytest.mark.skipif(
    not shutil.which("promtool"), reason="Prometheus is not installed (apt install prometheus)"
)
def test_the_alerts_over_time(tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path)
    shutil.copy(Path(__file__).with_name("rules_test.yaml"), tmp_path)
    said = subprocess.run(
        ["promtool", "test", "rules", "rules_test.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.fixture
def prometheus(ledger: Ledger, tmp_path: Path) -> Iterator[str]:
    """A Prometheus of our own with the shipped rules, scraping the ledger's metrics each second."""
    if not shutil.which("prometheus"):
        pytest.skip("Prometheus is not installed (apt install prometheus)")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ConsiliumCollector(ledger, lambda: NODES, {"coordinator": NOW + timedelta(days=9)}))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    config: dict[str, Any] = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {"job_name": "consilium", "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}]}
        ],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
    ]
    process = subprocess.Popen(
        [*command, f"--web.listen-address={address}"], stderr=(tmp_path / "log").open("w")
    )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)
        server.shutdown()
        thread.join()


def test_a_real_prometheus_fires_and_the_dashboard_finds_its_numbers(prometheus: str) -> None:
    def ask(path: str, **parameters: str) -> Any:
        return httpx.get(f"{prometheus}/api/v1/{path}", params=parameters, timeout=30).json()

    states: dict[str, str] = {}
    until = time.monotonic() + 120
    while states.get("ConsiliumCertificateNearExpiry") != "firing" or "ConsiliumCentreOffline" not in states:
        assert time.monotonic() < until, states
        time.sleep(1)
        try:
            states = {
                alert["labels"]["alertname"]: alert["state"] for alert in ask("alerts")["data"]["alerts"]
            }
        except (httpx.HTTPError, ValueError):
            continue  # it is starting
    assert states == {
        "ConsiliumCertificateNearExpiry": "firing",
        "ConsiliumCentreOffline": "pending",
    }  # five minutes it has

    dashboard = json.loads((ROOT / "deploy" / "grafana" / "consilium.json").read_text())
    empty = []
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$run", "r").replace("$__rate_interval", "1m")
            answer = ask("query", query=expression)
            while answer["status"] == "success" and not answer["data"]["result"] and time.monotonic() < until:
                time.sleep(1)  # a rate wants two scrapes
                answer = ask("query", query=expression)
            assert answer["status"] == "success", f"{panel['title']}: {answer}"
            if not answer["data"]["result"]:
                empty.append(panel["title"])
    assert not empty
