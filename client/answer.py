"""The centre's answers to the coordinator's requests: plain functions, no Flower. `answer` is the only door, and it never raises."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
import time
import traceback
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from client import budget, egress, noisy, personal, received, secagg, soft_labels, wire
from client.cohort import label_columns
from client.policy import Policy, describe, load_policy, permit, release
from client.queries import QUERIES, Question
from client.round import account_of, masses, personal_folder, prepared_model, train_round
from client.runtime import threads
from client.scans import cohort_of, forget, read_scans
from client.site import Site, holdings, home, name_of, safe, state_folder
from client.store import Store
from common.compose import config_from
from common.errors import ConsiliumError, Declined, Refused
from common.fingerprint import fingerprint
from common.logs import about
from common.messages import Answer, Hello, Lacking, Presence, Query, Refusal, Reply, Request, Train
from common.schema import Config
from common.secagg import ALL, hides_all, masked
from common.tasks import columns_of

log = logging.getLogger("consilium.centre")


def answer(site: Site, request: Request) -> Reply:
    """Do what the request asks and the policy allows, or say why not. What leaves is recorded first (client/egress.py)."""
    of_round: dict[str, str | int] = {"stage": request.stage, "round": request.round} if isinstance(request, Train) else {}
    with about(run=request.run, kind=type(request).__name__, centre=site.centre, **of_round):
        return _recorded(site, request)


def _recorded(site: Site, request: Request) -> Reply:
    reply = _answer(site, request)
    try:
        if folder := _records(site, request):
            egress.record(folder, request, reply)
    except Refused as refused:
        return Refusal(reply.centre, str(refused))
    return reply


def _records(site: Site, request: Request) -> Path | None:
    """The state folder of the site; None of a node that has no part in the run."""
    if site.centre:
        return state_folder(site, Path(site.data)) if site.data or site.state else None
    try:
        config = config_from(request.config)
        return home(site, config) if holdings(site, config) else None
    except ConsiliumError:
        return None  # of a simulation whose configuration nobody understands


def _answer(site: Site, request: Request) -> Reply:
    """An unexpected error is named by type and place only: its text may hold a path or a name."""
    centre = site.centre or f"node {site.index}"
    try:
        config = config_from(request.config)
        centre = name_of(site, config) or centre
        if not holdings(site, config) and not isinstance(request, Hello):
            raise Refused(f"node {site.index} has no part in this run")
        policy = load_policy(site.policy)
        permit(policy, request, config, datetime.now())
        limit_gpu(policy.gpu_memory, site)
        site = replace(site, smallest_cell=max(site.smallest_cell, policy.smallest_cell))
        if isinstance(request, Hello):
            return hello(site, config, policy)
        folder = home(site, config)
        if not isinstance(request, Train | Query):
            return release(policy, secagg.step(folder, config, centre, request, policy))
        request = received.completed(folder, config, request)
        if isinstance(request, Query):
            said = release(policy, query(site, config, request, policy), request.name)
            return secagg.masked_answer(folder, config, request, said) if masked(config, request) else said
        if not masked(config, request):
            return release(policy, train_round(site, config, request, policy))
        if again := secagg.kept(folder, request):
            return again
        return secagg.masked_change(folder, config, request, train_round(site, config, request, policy), masses(site, config))
    except received.Missing:
        return Lacking(centre)
    except Refused as refused:
        return Refusal(centre, str(refused), isinstance(refused, Declined))
    except ConsiliumError as error:  # its sentence may name a file: that stays in a hospital
        log.error("%s", error)
        return Refusal(centre, str(error) if not site.centre else f"{_where(error)}; the sentence is in the centre's log")
    except Exception as error:
        log.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))  # its text stays out of the log too
        return Refusal(centre, f"{type(error).__name__} in {_where(error)}; the centre's log has the rest")


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).stem}.{frame.name}, line {frame.lineno}"


def hello(site: Site, config: Config, policy: Policy) -> Presence:
    """Make everything ready, and say what there is."""
    forget()
    own = holdings(site, config)
    held, skipped = read_scans(site, config) if own else ({}, [])
    tables = [cohort_of(site, config, centre, path) for centre, path in own.items()]
    asked = {c for name, task in config.tasks.items() for c in columns_of(name, task)}  # what else the table holds is nobody's business
    columns = sorted({c for table in tables for c in [*label_columns(table), "source"] if c in asked})
    sources = sorted({str(s) for table in tables for s in table["source"]})
    for name, task in config.tasks.items():
        if missing := [c for c in columns_of(name, task) if own and c not in columns]:
            log.warning("no column '%s' for task '%s': this centre adds nothing to it", ", ".join(missing), name)
    hidden = hides_all(config)
    versions = {p: importlib.metadata.version(p) for p in ("torch", "timm", "flwr")} | {"python": platform.python_version()}
    return Presence(
        centre=name_of(site, config),
        cohorts=list(own),
        fingerprint=fingerprint(),
        sources=sources,
        columns=columns,
        scans={} if hidden or config.privacy.queries else {split: len(scans) for split, scans in held.items()},
        skipped={} if hidden else dict(Counter(s.reason for s in skipped)),
        versions=versions,
        device=str(site.torch_device()),
        policy=dict(describe(policy)),
    )


def query(site: Site, config: Config, request: Query, policy: Policy) -> Answer:
    """One additive query (client/queries.py), with the noise that `privacy.queries` asks for, charged before it leaves."""
    if request.name not in QUERIES:
        raise Refused(f"query '{request.name}' is not one this centre answers: {', '.join(QUERIES)}")
    if config.privacy.kind == "patient" and (
        request.name not in ("counts", "scores") or (request.name, request.split) == ("scores", "train")
    ):
        raise Refused(f"query '{request.name}' would tell of training scans without noise, which privacy=patient does not allow")
    if request.split == "test":
        wire.forget(home(site, config), request.run)
        secagg.forget(home(site, config), request.run)
    began = time.perf_counter()
    scans, _ = read_scans(site, config)
    stage = config.stages[request.stage] if request.stage else next(iter(config.stages.values()))
    model = None
    if request.weights is not None:
        model = prepared_model(site, config, stage, request.weights, request.run, request.personal)
        if request.split == "test" and request.personal:
            personal.note(personal_folder(site, config), request.run, request.personal, request.weights)
    if request.split not in scans or (request.task and request.task not in config.tasks):
        raise Refused(f"there is no split '{request.split}' or no task '{request.task}' to answer for")
    told = config.privacy.queries
    if told:
        scans = {split: noisy.limited(some, config.privacy.scans) for split, some in scans.items()}
    features = home(site, config) / "features" / safe(request.run)
    stores = {centre: Store(state_folder(site, path) / "slices") for centre, path in holdings(site, config).items()}
    question = Question(
        scans,
        request.split,
        config,
        stage,
        model,
        request.task,
        1 if told else site.smallest_cell,  # noise comes first: one scan more may add 1 to a cell and no more
        site.torch_device(),
        request.centroids,
        features,
        stores,
    )
    with threads(site.threads):
        sums = QUERIES[request.name](question)
        if request.name == "counts" and masked(config, request):
            sums |= {f"{ALL}/mass/{t}": np.array([value]) for t, value in masses(site, config).items()}
        if request.clustering:
            soft_labels.keep(home(site, config), request.clustering, question)
            shutil.rmtree(features, ignore_errors=True)
    if told:
        budget.charge(account_of(site, config, policy), (told, 1.0, 1), request)
        sums = noisy.noised(sums, config, request.name, site.smallest_cell)
    return Answer(name_of(site, config), sums, time.perf_counter() - began)


def limit_gpu(gibibytes: float, site: Site) -> None:
    """Let training take no more of the GPU's memory than the policy says."""
    if gibibytes and (device := site.torch_device()).type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gibibytes * 2**30 / whole), device)
