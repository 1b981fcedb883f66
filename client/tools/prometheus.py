"""The centre's own metrics in Prometheus' text format, made from its state folder when asked: `consilium-centre metrics`.

Nothing listens for them: the hospital's own timer writes them to a file that its node_exporter reads (textfile collector). No port is opened in a
place that promises outgoing connections only, and nobody who does not run the command has them. They are for the hospital, and go nowhere else.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cryptography import x509
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from client.data.cohort import load_cohort
from client.site import egress_log, privacy_budget
from client.site.config import Site, cohort_state_dir
from client.site.policy import load_policy
from common.privacy.accountant import compute_epsilon
from common.protocol.code_fingerprint import fingerprint_code
from common.utils.errors import ConsiliumError


def render_metrics(site: Site, ca_file: Path) -> bytes:
    """All metrics of a site. `authority`: the ca.crt that it trusts. Raises ConsiliumError where the policy, cohort or budget cannot be read."""
    if not site.data:
        raise ConsiliumError(
            "site.yaml names no data; set `data` to a folder with cohort.csv, or to a cohort table"
        )

    class CentreCollector(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from _collect_site(site)
            yield from _collect_egress(cohort_state_dir(site, Path(site.data)))
            yield from _collect_certificate(ca_file)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(CentreCollector())
    return generate_latest(registry)


def _collect_site(site: Site) -> Iterator[Metric]:
    folder, policy = cohort_state_dir(site, Path(site.data)), load_policy(site.policy)
    build = _make_gauge("build_info", "the code installed at the centre", "fingerprint")
    build.add_metric([fingerprint_code()], 1)
    yield build
    table = load_cohort(Path(site.data), site.centre)
    scans = _make_gauge("cohort_scans", "scans in the cohort's table", "split")
    for split, n in table["split"].value_counts().items():
        scans.add_metric([str(split)], n)
    yield scans
    marks = privacy_budget.hash_patients(str(patient) for patient in table["patient"])
    charges = privacy_budget.read_charges(privacy_budget.PrivacyAccount(folder / "budget", marks))
    yield _make_value_gauge(
        "privacy_epsilon",
        "what the patients lost in all runs, at the policy's delta",
        compute_epsilon(charges, policy.delta),
    )
    if policy.epsilon:
        yield _make_value_gauge("privacy_epsilon_limit", "the loss that the policy allows", policy.epsilon)
    if folder.is_dir():
        yield _make_value_gauge(
            "state_free_bytes", "room on the disk of the state folder", shutil.disk_usage(folder).free
        )


def _collect_egress(folder: Path) -> Iterator[Metric]:
    """What left, by the log; and whether its chain is whole."""
    messages, sizes, last = Counter[str](), Counter[str](), ""
    whole = True
    try:
        for entry in egress_log.read_entries(folder):
            kind = f"{entry['kind']} {entry['query']}".strip()
            messages[kind] += 1
            sizes[kind] += entry["bytes"]
            last = entry["time"]
    except ConsiliumError:
        whole = not (folder / egress_log.LOG_FILENAME).exists()  # of nothing sent there is no log
    sent = CounterMetricFamily(
        "consilium_centre_egress_messages", "messages that left, by kind", labels=["kind"]
    )
    size = CounterMetricFamily("consilium_centre_egress_bytes", "bytes that left, by kind", labels=["kind"])
    for kind in sorted(messages):
        sent.add_metric([kind], messages[kind])
        size.add_metric([kind], sizes[kind])
    yield from (
        sent,
        size,
        _make_value_gauge(
            "egress_chain_whole", "1: no line of the egress log was changed or removed", float(whole)
        ),
    )
    if last:
        yield _make_value_gauge(
            "egress_last_timestamp_seconds",
            "when the last message left",
            datetime.fromisoformat(last).timestamp(),
        )


def _collect_certificate(ca_file: Path) -> Iterator[Metric]:
    try:
        until = x509.load_pem_x509_certificate(ca_file.read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return  # a simulation has none
    yield _make_value_gauge(
        "certificate_expiry_timestamp_seconds",
        "when the authority's certificate expires that the centre trusts",
        until,
    )


def _make_gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"consilium_centre_{name}", text, labels=labels)


def _make_value_gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"consilium_centre_{name}", text, value=value)
