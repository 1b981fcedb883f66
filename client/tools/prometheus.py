"""`consilium-centre metrics`: the centre's own metrics in Prometheus' text format, from its state folder.

Nothing listens for requests, so that no port is opened in a hospital that promises outgoing connections
only: the hospital's own timer writes the metrics to a file that its node_exporter reads (textfile
collector). They are for the hospital and go nowhere else.
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
from client.site import egress_log
from client.site.config import Site, cohort_state_dir, outer_anchor
from client.site.egress_anchor import has_records
from client.site.policy import load_policy
from client.site.privacy_budget import PrivacyAccount, hash_patients, read_charges
from common.privacy.accountant import compute_epsilon
from common.protocol.code_fingerprint import fingerprint_code
from common.utils.errors import ConsiliumError


class CentreCollector(Collector):
    """Collects a site's metrics; `ca_file` is the certificate authority that it trusts."""

    def __init__(self, site: Site, ca_file: Path) -> None:
        """Collect for one site."""
        self.site = site
        self.ca_file = ca_file

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield from _collect_site(self.site)
        yield from _collect_egress(self.site)
        yield from _collect_certificate(self.ca_file)


def render_metrics(site: Site, ca_file: Path) -> bytes:
    """Render all metrics of a site; raises ConsiliumError when policy, cohort or budget cannot be read."""
    if not site.data:
        raise ConsiliumError(
            "site.yaml names no data; set `data` to a folder with cohort.csv, or to a cohort table"
        )
    registry = CollectorRegistry(auto_describe=False)
    registry.register(CentreCollector(site, ca_file))
    return generate_latest(registry)


def _collect_site(site: Site) -> Iterator[Metric]:
    """Yield metrics of code, cohort, privacy budget and disk."""
    folder = cohort_state_dir(site, Path(site.data))
    policy = load_policy(site.policy)
    build = _make_gauge("build_info", "the code installed at the centre", "fingerprint")
    build.add_metric([fingerprint_code()], 1)
    yield build
    cohort = load_cohort(Path(site.data), site.centre)
    scans = _make_gauge("cohort_scans", "scans in the cohort's table", "split")
    for split, count in cohort["split"].value_counts().items():
        scans.add_metric([str(split)], count)
    yield scans
    anchor = outer_anchor(site, Path(site.data))
    patients = hash_patients(map(str, cohort["patient"]))
    account = PrivacyAccount(folder / "budget", patients, outer_anchor=anchor)
    yield _make_value_gauge(
        "privacy_epsilon",
        "what the patients lost in all runs, at the policy's delta",
        compute_epsilon(read_charges(account), policy.delta),
    )
    if policy.epsilon:
        yield _make_value_gauge("privacy_epsilon_limit", "the loss that the policy allows", policy.epsilon)
    if folder.is_dir():
        free_bytes = shutil.disk_usage(folder).free
        yield _make_value_gauge("state_free_bytes", "room on the disk of the state folder", free_bytes)


def _collect_egress(site: Site) -> Iterator[Metric]:
    """Yield what left, by the egress log, and whether the log's chain is intact."""
    folder = cohort_state_dir(site, Path(site.data))
    anchor = outer_anchor(site, Path(site.data))
    message_counts: Counter[str] = Counter()
    byte_counts: Counter[str] = Counter()
    last_time = ""
    is_intact = True
    try:
        for entry in egress_log.read_entries(folder, anchor):
            kind = f"{entry.kind} {entry.query}".strip()
            message_counts[kind] += 1
            byte_counts[kind] += entry.bytes
            last_time = entry.time
    except ConsiliumError:
        is_intact = not has_records(folder, anchor)  # before the first message there is no log
    yield _make_counter("egress_messages", "messages that left, by kind", message_counts)
    yield _make_counter("egress_bytes", "bytes that left, by kind", byte_counts)
    yield _make_value_gauge(
        "egress_chain_whole", "1: no line of the egress log was changed or removed", float(is_intact)
    )
    if last_time:
        timestamp = datetime.fromisoformat(last_time).timestamp()
        yield _make_value_gauge("egress_last_timestamp_seconds", "when the last message left", timestamp)


def _collect_certificate(ca_file: Path) -> Iterator[Metric]:
    """Yield when the certificate of the authority expires, where there is one: a simulation has none."""
    try:
        certificate = x509.load_pem_x509_certificate(ca_file.read_bytes())
    except (OSError, ValueError):
        return
    yield _make_value_gauge(
        "certificate_expiry_timestamp_seconds",
        "when the certificate of the authority that the centre trusts expires",
        certificate.not_valid_after_utc.timestamp(),
    )


def _make_counter(name: str, text: str, counts: Counter[str]) -> CounterMetricFamily:
    counter = CounterMetricFamily(f"consilium_centre_{name}", text, labels=["kind"])
    for kind in sorted(counts):
        counter.add_metric([kind], counts[kind])
    return counter


def _make_gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"consilium_centre_{name}", text, labels=labels)


def _make_value_gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"consilium_centre_{name}", text, value=value)
