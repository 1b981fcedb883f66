"""Answer a JoinRequest: preprocess the cohort where needed, and describe the centre and its data."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections import Counter
from collections.abc import Mapping

import pandas as pd

from client.data.columns import find_task_columns
from client.data.loading import clear_dataset_cache, load_centre_cohort, load_datasets
from client.federation.released_data import load_released_datasets
from client.federation.run_context import RunContext
from client.site.config import local_cohorts
from client.site.policy import describe_policy, list_open_rules, may_disclose_sources
from common.config.names import MAX_TEXT_LENGTH, TEXT_RULE, is_plain_text
from common.config.schema import Config
from common.learning.losses import task_label_columns
from common.privacy.secure_aggregation import hides_statistics
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import JoinReply, JoinRequest
from common.utils.errors import RefusalCode, Refused

REPORTED_PACKAGES = ("torch", "timm", "flwr")

log = logging.getLogger("consilium.centre")


def handle_join(context: RunContext, request: JoinRequest) -> JoinReply:
    """Read the cohort anew, preprocess its scans, and describe it as far as the run's privacy allows."""
    site = context.site
    config = context.config
    if site.centre:  # no hospital in a simulation
        for sentence in list_open_rules(context.policy):
            log.warning("policy: %s", sentence)
    clear_dataset_cache()
    cohorts = local_cohorts(site, config)
    hides_counts = hides_statistics(config) or config.privacy.dp_level == "patient"
    scans: dict[str, int] = {}
    skipped: dict[str, int] = {}
    if cohorts:
        skipped_items = load_datasets(site, config).skipped
        skipped = dict(Counter(item.reason for item in skipped_items))
        if not hides_counts:
            scans = {split: len(dataset) for split, dataset in load_released_datasets(context).items()}
    tables = [load_centre_cohort(site, config, centre, path) for centre, path in cohorts.items()]
    columns = _find_requested_columns(tables, config)
    if cohorts:
        _warn_of_missing_columns(columns, config)
    return JoinReply(
        centre=context.centre,
        cohorts=list(cohorts),
        fingerprint=fingerprint_code(),
        sources=_list_sources(context, tables),
        columns=columns,
        scans=scans,
        skipped={} if hides_counts else round_skipped(skipped, tables, site.min_cell_count),
        versions=_list_versions(),
        device=str(site.resolve_device()),
        policy=dict(describe_policy(context.policy)),
    )


def _list_sources(context: RunContext, tables: list[pd.DataFrame]) -> list[str]:
    """Return the sources that have enough patients; only the centre's name where the policy keeps them here.

    Raises Refused where such a source is no plain text.
    """
    if tables and not may_disclose_sources(context.policy):
        return [context.centre]
    sources: set[str] = set()
    for table in tables:
        num_patients = table["patient"].groupby(table["source"], dropna=False).nunique()
        reportable = num_patients.index[num_patients >= context.site.min_cell_count]
        sources.update(str(source) for source in reportable)
    if not all(map(is_plain_text, sources)):
        raise Refused(
            f"the cohort has a source whose name cannot be sent; {TEXT_RULE.format(MAX_TEXT_LENGTH)}",
            RefusalCode.NO_DATA,
        )
    return sorted(sources)


def round_skipped(
    skipped: Mapping[str, int], tables: list[pd.DataFrame], min_patients: int
) -> dict[str, int]:
    """Return {reason: scans} rounded down to numbers that surely stand for enough patients."""
    scans_by_patient = Counter(patient for table in tables for patient in table["patient"])
    unit = 1 + sum(count for _, count in scans_by_patient.most_common(min_patients - 1))
    rounded = {reason: count // unit * unit for reason, count in skipped.items()}
    return {reason: count for reason, count in rounded.items() if count}


def _find_requested_columns(tables: list[pd.DataFrame], config: Config) -> list[str]:
    """Return which of the recipe's label columns the cohorts have; their other columns are not disclosed."""
    requested: set[str] = set()
    for name, task in config.tasks.items():
        requested.update(task_label_columns(name, task))
    available: set[str] = set()
    for table in tables:
        available |= find_task_columns(table)
    return sorted(requested & available)


def _warn_of_missing_columns(columns: list[str], config: Config) -> None:
    for name, task in config.tasks.items():
        missing = [column for column in task_label_columns(name, task) if column not in columns]
        if missing:
            log.warning(
                "the cohort has no column '%s', so this centre does not contribute to task '%s'",
                ", ".join(missing),
                name,
            )


def _list_versions() -> dict[str, str]:
    versions = {package: importlib.metadata.version(package) for package in REPORTED_PACKAGES}
    versions["python"] = platform.python_version()
    return versions
