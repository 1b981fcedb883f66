"""The metrics for Prometheus: a ledger's samples, and the shipped alerts and dashboard in a real one."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.monitoring.health import SuperLinkNode
from server.monitoring.prometheus import ConsiliumCollector, render_metrics
from server.run.records import CentreRound, CentreScores, RoundRecord, TaskScores, WorstCentre

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "consilium.json"
START_TIMEOUT = 120  # seconds until Prometheus has fired the alerts
NOW = datetime.now(UTC)
NODES = [SuperLinkNode("north", True, NOW, NOW), SuperLinkNode("south", False, NOW, NOW)]
WEIGHTS = {"north": 0.25, "south": 0.75}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A ledger with a run of two rounds and two centres.

    The second centre's AUC is undefined, its budget is nearly spent, and its last contribution was left out.
    """
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('ledger')}/ledger.db")
    config = config_to_dict(
        compose_config(["federation.centres=[north,south]", "federation.round_timeout=600"])
    )
    ledger.add_run("old", recipe="multisource", mode="federated", config=config, code_fingerprint="f")
    ledger.log_event("old", "finished")
    ledger.add_run("r", recipe="multisource", mode="federated", config=config, code_fingerprint="f")
    for centre in ("north", "south"):
        metadata = {
            "scans": {"train": 80, "val": 20},
            "skipped": {"file is missing": 2},
            "policy": {"epsilon": 4.0},
            "sources": [centre],
        }
        ledger.add_centre("r", centre, metadata)
    for number in (1, 2):
        ledger.add_round("r", "main", make_round(number), started=NOW, close_reason="all replied")
    return ledger


def make_round(number: int) -> RoundRecord:
    """Return a round's record; of the second round, south's contribution is left out."""
    north = CentreRound(accepted=True, scans=80, bytes_up=1000, bytes_down=3000, epsilon=1.0)
    south = replace(north, accepted=number == 1, epsilon=3.7 * number / 2)
    scores = TaskScores(
        centres={
            "north": CentreScores({"auc": 0.9, "f1": 0.8}),
            "south": CentreScores({"auc": None}, reasons={"auc": "one class only"}),
        },
        macro={"auc": 0.9},
        pooled={},
        worst={"auc": WorstCentre(0.9, "north")},
        spread={},
    )
    return RoundRecord(
        number,
        seconds=12.5,
        weights={"backbone": WEIGHTS},
        effective_centres={"backbone": 1.6},
        centres={"north": north, "south": south},
        validation={"covid": scores},
    )


def parse_samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return {(name, labels): value}."""
    samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            samples[sample.name, frozenset(sample.labels.items())] = sample.value
    return samples


def test_samples_are_what_the_ledger_holds(ledger: Ledger) -> None:
    expiry = NOW + timedelta(days=9)
    samples = parse_samples(render_metrics(ledger, lambda: NODES, {"coordinator": expiry}))

    def get_sample(name: str, **labels: str) -> float | None:
        return samples.get((f"consilium_{name}", frozenset(labels.items())))

    assert get_sample("centre_up", centre="north") == 1
    assert get_sample("centre_up", centre="south") == 0
    assert get_sample("centre_state", centre="south", state="offline") == 1
    assert get_sample("centre_scans", centre="north", split="train") == 80
    assert get_sample("centre_scans_unreadable", centre="north") == 2
    assert get_sample("centre_sent_bytes_total", run="r", centre="north") == 2000
    assert get_sample("contributions_total", run="r", centre="south", outcome="left_out") == 1
    assert get_sample("centre_privacy_epsilon", run="r", centre="south") == 1.85  # of the last accepted one
    assert get_sample("centre_privacy_epsilon_limit", centre="south") == 4
    assert get_sample("run_round", run="r", stage="main") == 2
    assert get_sample("round_deadline_seconds", run="r") == 600
    assert get_sample("centre_weight", run="r", centre="south") == 0.75
    effective_centres = 1 / (0.25**2 + 0.75**2)
    assert get_sample("effective_centres", run="r", part="backbone") == pytest.approx(effective_centres)
    assert get_sample("centre_score", run="r", task="covid", centre="north", metric="auc") == 0.9
    assert get_sample("score", run="r", task="covid", view="worst", metric="auc") == 0.9
    assert get_sample("certificate_expiry_timestamp_seconds", certificate="coordinator") == expiry.timestamp()
    assert get_sample("runs", status="finished") == 1
    # What is undefined has no sample, and a run that has ended is no longer shown.
    assert get_sample("centre_score", run="r", task="covid", centre="south", metric="auc") is None
    assert not any("old" in dict(labels).values() for _, labels in samples)


def test_unreachable_superlink_is_a_metric(ledger: Ledger) -> None:
    def fail() -> list[SuperLinkNode]:
        raise ConsiliumError("the SuperLink cannot be reached")

    assert parse_samples(render_metrics(ledger, fail))["consilium_superlink_up", frozenset()] == 0


def test_unreadable_ledger_is_a_metric(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.was_connected = False  # do not wait for its return
    ledger._engine.dispose()
    (tmp_path / "ledger.db").write_bytes(b"nonsense" * 1000)
    assert parse_samples(render_metrics(ledger))["consilium_ledger_up", frozenset()] == 0


@pytest.mark.skipif(
    not shutil.which("promtool"), reason="Prometheus is not installed (apt install prometheus)"
)
def test_alerts_fire_over_time(tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path)
    shutil.copy(Path(__file__).with_name("rules_test.yaml"), tmp_path)
    command = ["promtool", "test", "rules", "rules_test.yaml"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture
def prometheus(ledger: Ledger, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus with the shipped rules, which scrapes the ledger's metrics every second."""
    if not shutil.which("prometheus"):
        pytest.skip("Prometheus is not installed (apt install prometheus)")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ConsiliumCollector(ledger, lambda: NODES, {"coordinator": NOW + timedelta(days=9)}))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    target = {"targets": [f"127.0.0.1:{server.server_port}"]}
    config: dict[str, Any] = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "consilium", "static_configs": [target]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free_socket.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address={address}",
    ]
    process = subprocess.Popen(command, stderr=(tmp_path / "log").open("w"))
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)
        server.shutdown()
        thread.join()


def query_api(address: str, path: str, **parameters: str) -> Any:
    """Return Prometheus' reply to an API request."""
    return httpx.get(f"{address}/api/v1/{path}", params=parameters, timeout=30).json()


def read_alert_states(address: str) -> dict[str, str]:
    """Return {alert: state}; {} while Prometheus is starting."""
    try:
        alerts = query_api(address, "alerts")["data"]["alerts"]
    except (httpx.HTTPError, ValueError):
        return {}
    return {alert["labels"]["alertname"]: alert["state"] for alert in alerts}


def test_real_prometheus_fires_alerts_and_fills_the_dashboard(prometheus: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    states: dict[str, str] = {}
    while states.get("ConsiliumCertificateNearExpiry") != "firing" or "ConsiliumCentreOffline" not in states:
        assert time.monotonic() < deadline, states
        time.sleep(1)
        states = read_alert_states(prometheus)
    # An offline centre is reported after five minutes.
    assert states == {"ConsiliumCertificateNearExpiry": "firing", "ConsiliumCentreOffline": "pending"}

    empty_panels = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$run", "r").replace("$__rate_interval", "1m")
            answer = query_api(prometheus, "query", query=expression)
            while is_empty(answer) and time.monotonic() < deadline:
                time.sleep(1)  # a rate needs two scrapes
                answer = query_api(prometheus, "query", query=expression)
            assert answer["status"] == "success", f"{panel['title']}: {answer}"
            if is_empty(answer):
                empty_panels.append(panel["title"])
    assert not empty_panels


def is_empty(answer: dict[str, Any]) -> bool:
    """Return whether a successful query found nothing."""
    return answer["status"] == "success" and not answer["data"]["result"]
