"""A round at this centre: local training from the received weights, what it costs in privacy, what of it stays here and what may leave."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from client import budget, noisy, personal, private, wire
from client.cohort import load_cohort
from client.dataset import Scans, batches, steps_in_round
from client.objective import Batch
from client.policy import Policy
from client.queries import class_counts
from client.runtime import fastest, threads
from client.scans import read_scans
from client.site import Site, holdings, home, name_of
from client.trainer import train
from common.accountant import Charge, epsilon, noise_for
from common.codec import Arrays, codec_of
from common.compose import active, refuse_unprotected
from common.errors import ConsiliumError, Declined, Refused
from common.imbalance import logit_adjustment, mass
from common.messages import Contribution, Train
from common.model import Model, make_model, refuse_batch_norm
from common.schema import Config, Stage
from common.secagg import hides_all, masked
from common.seeds import derive
from common.tasks import cells_of
from common.weights import NONE, Weights, flatten, layout_of, load


def train_round(site: Site, config: Config, request: Train, policy: Policy) -> Contribution:
    """One round of local training from the received weights. With `privacy=patient` it is charged to the cohort's budget before it leaves."""
    began = time.perf_counter()
    centre, stage = name_of(site, config), config.stages[request.stage]
    tasks = {t: config.tasks[t] for t in active(config, stage)}
    held = read_scans(site, config)[0]["train"]
    scans = held.with_label(list(tasks)) if len(held) else held
    if not len(scans):
        if hides_all(config):  # the coordinator cannot know, and shall not wait for it
            raise Declined(f"no training scan is labelled for {', '.join(tasks)}")
        raise Refused(f"{len(held)} training scans, none labelled for {', '.join(tasks)}; check the cohort's split and label columns")
    account = account_of(site, config, policy) if config.privacy.kind == "patient" else None
    if account and (again := budget.kept(account, request)):
        return again
    adjustments = {}
    for name, task in tasks.items():
        if task.prior != "none":
            own = class_counts(scans.targets[name], len(cells_of(name, task)))[:-1]
            counts = request.global_counts[name] if task.prior == "global" else own
            adjustments[name] = torch.tensor(logit_adjustment(counts, task.tau, task.adjust), dtype=torch.float32)
    count = site.threads
    if stage.runtime == "auto":
        choice = fastest(site, config, stage, tasks, scans, home(site, config))
        stage, count = replace(stage, precision=choice.precision, channels_last=choice.channels_last), choice.threads
    model = prepared_model(site, config, stage, request.weights, request.run, request.personal)
    seed = derive(config.seed, request.stage, request.round, centre)
    protection = None
    if account:
        price, protection = terms(config, held, request, model)
        budget.afford(account, price)
        _, odds, steps = price
        some: Iterable[Batch | private.Patients] = private.drawn(scans, tasks, odds, steps, seed)
    else:
        steps = steps_in_round(scans, stage, request.average)
        some = batches(scans, tasks, stage, steps, seed)
    with threads(count):
        report = train(
            model, some, stage, tasks, adjustments,
            protection=protection, progress=((request.round - 1) / stage.rounds, request.round / stage.rounds),
            steps=steps, rate=request.rate, seed=seed, device=site.torch_device(),
        )  # fmt: skip
    layout = layout_of(model)
    after = flatten(model, layout)
    delta = after.floats - request.weights.floats
    if stage.personal:
        folder = personal_folder(site, config)
        personal.save(folder, request.run, request.stage, request.round, after, personal.mask_of(layout, stage.personal))
        personal.forget(folder, request.run, stage, request.stage, [*request.keep, request.round])
        if "all" in stage.personal:
            delta = NONE
    arrays: Arrays = {}
    if len(delta) and (codec := codec_of(config)) != "fp32" and not masked(config, request):
        arrays, delta = wire.coded(home(site, config), request, delta, layout, codec), NONE
    seen = round(protection.expected * steps) if protection else report.scans  # how many were drawn is nobody's business
    losses = {t: list(v) for t, v in report.losses.items()}
    contribution = Contribution(centre, delta, after.integers, seen, report.steps, losses, time.perf_counter() - began, arrays)
    if account:
        contribution.epsilon = epsilon(budget.charge(account, price, request), config.privacy.delta)
        budget.keep(account, request, contribution)
    return contribution


def masses(site: Site, config: Config) -> dict[str, float]:
    """{task: what this site's training scans weigh, before it is divided by all centres' sum}."""
    scans = read_scans(site, config)[0]["train"]
    cells = {t: class_counts(scans.targets[t], len(cells_of(t, task)), site.smallest_cell)[:-1] for t, task in config.tasks.items()}
    return {t: mass(n, config.aggregation) for t, n in cells.items()}


def account_of(site: Site, config: Config, policy: Policy) -> budget.Account:
    """The privacy budget of this site's patients: all in its tables, whichever of them a run takes."""
    tables = [load_cohort(path, centre) for centre, path in holdings(site, config).items()]
    marks = budget.marks_of(str(patient) for table in tables for patient in table["patient"])
    return budget.Account(home(site, config) / "budget", marks, policy.epsilon, policy.delta)


def terms(config: Config, held: Scans, request: Train, model: Model) -> tuple[Charge, private.Protection]:
    """What a round of the stage costs, and what protects it: the noise is the run's, planned over all rounds of all its stages. Raises Refused
    for a configuration that protects nobody."""
    paces = {n: private.pace(held.with_label(active(config, s)), s, request.average) for n, s in config.stages.items()}
    plan = tuple((odds, steps * config.stages[n].rounds) for n, (patients, odds, steps) in paces.items() if patients)
    answers = ((config.privacy.queries, 1.0, noisy.asked(config)),) if config.privacy.queries else ()
    try:
        refuse_unprotected(config)
        refuse_batch_norm(model)
        noise = config.privacy.noise or noise_for(config.privacy.epsilon, config.privacy.delta, plan, answers)
    except ConsiliumError as error:
        raise Refused(str(error)) from error
    patients, odds, steps = paces[request.stage]
    return (noise, odds, steps), private.Protection(config.privacy.clip, noise, odds * patients)


def prepared_model(site: Site, config: Config, stage: Stage, weights: Weights, run: str, own: list[tuple[str, int]]) -> Model:
    """The model with the received weights and this centre's personal ones laid over."""
    model = make_model(config.backbone, config.tasks, 0, stage.channels_last, stage.checkpointing)
    load(model, layout_of(model), personal.lay_over(personal_folder(site, config), run, [(s, int(r)) for s, r in own], weights))
    return model


def personal_folder(site: Site, config: Config) -> Path:
    """Where this site's personal weights lie; the pooled site's with the first centre."""
    return home(site, config) / ("pooled" if config.federation.mode == "central" else "personal")
