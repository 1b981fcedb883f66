"""A hospital that requires approval takes part in what it has approved, by content, and in nothing else."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.federation.handlers import handle_request
from client.site.approvals import Approval, add_approval, read_approvals, withdraw_approval
from client.site.config import Site
from client.tools.approve import load_recipe, parse_expiry
from common.config.parse import config_to_dict
from common.config.recipe_digest import compute_recipe_digest
from common.config.schema import Config
from common.protocol.messages import (
    JoinReply,
    JoinRequest,
    Refusal,
    Reply,
    StatisticsReply,
    StatisticsRequest,
)
from common.utils.errors import ConsiliumError, RefusalCode
from tests.client.hospital import expect_train_reply, make_config, make_site, refusal_reason, train_request
from tests.client.hospital import hospital as hospital

TODAY = date.today()


@pytest.fixture
def site(hospital: Path, tmp_path: Path) -> Site:
    """A hospital that requires approval."""
    (tmp_path / "policy.yaml").write_text("require_approval: true\n")
    return make_site(hospital, state=str(tmp_path / "state"), policy=str(tmp_path / "policy.yaml"))


def approve(site: Site, config: Config, **changes: Any) -> Approval:
    approval = Approval(compute_recipe_digest(config), config.recipe, TODAY, TODAY + timedelta(days=9))
    approval = replace(approval, **changes)
    add_approval(Path(site.state), approval)
    return approval


def join(site: Site, config: Config) -> Reply:
    return handle_request(site, JoinRequest("run", config_to_dict(config)))


def test_only_the_approved_content_is_computed_whatever_the_recipe_is_called(site: Site) -> None:
    config = make_config()
    digest = compute_recipe_digest(config)
    refused = join(site, config)
    assert f"not approved the recipe with digest {digest}; " in refusal_reason(refused)
    assert "`consilium-centre approve`" in refusal_reason(refused)
    assert isinstance(refused, Refusal)
    assert refused.code == RefusalCode.POLICY
    approve(site, config)
    assert isinstance(join(site, config), JoinReply)
    assert isinstance(join(site, replace(config, recipe="renamed", seed=7)), JoinReply)
    more_rounds = make_config("stage.rounds=9")
    same_name = replace(more_rounds, recipe=config.recipe)
    assert "has not approved" in refusal_reason(join(site, same_name))
    assert "has not approved" in refusal_reason(handle_request(site, train_request(same_name)))
    counts = StatisticsRequest("run", config_to_dict(same_name), "counts", "")
    assert "has not approved" in refusal_reason(handle_request(site, counts))
    assert isinstance(handle_request(site, replace(counts, config=config_to_dict(config))), StatisticsReply)
    expect_train_reply(handle_request(site, train_request(config)))


def test_expired_and_withdrawn_approvals_do_not_hold(site: Site) -> None:
    config = make_config()
    yesterday = TODAY - timedelta(days=1)
    approval = approve(site, config, expires=yesterday)
    reason = refusal_reason(join(site, config))
    assert f"approval of the recipe with digest {approval.digest} expired on {yesterday}; " in reason
    assert replace(approval, expires=TODAY).is_valid(TODAY)
    approve(site, config)  # the last one counts
    assert isinstance(join(site, config), JoinReply)
    with pytest.raises(ConsiliumError, match="0 approvals begin with 'ffffffff'"):
        withdraw_approval(Path(site.state), "ffffffff", TODAY)
    with pytest.raises(ConsiliumError, match="approvals begin with ''"):
        withdraw_approval(Path(site.state), "", TODAY)
    withdraw_approval(Path(site.state), approval.digest[:12], TODAY)
    assert f"was withdrawn on {TODAY}" in refusal_reason(join(site, config))
    approve(site, config)
    assert isinstance(join(site, config), JoinReply)


def test_damaged_or_missing_approvals_approve_nothing(site: Site, tmp_path: Path) -> None:
    config = make_config()
    approve(site, config)
    path = tmp_path / "state" / "approvals.json"
    for damaged in (b"", b"{}", path.read_bytes()[:-9], b'[{"digest": "x"}]'):
        path.write_bytes(damaged)
        assert "approvals cannot be read" in refusal_reason(join(site, config))
        with pytest.raises(ConsiliumError, match="no recipe is approved"):
            read_approvals(path.parent)
    path.unlink()
    assert "has not approved" in refusal_reason(join(site, config))


def test_what_the_coordinator_fills_in_is_accepted_and_bounded(site: Site) -> None:
    overrides = (
        "recipe=transfer",
        "preprocess.num_slices=1",
        "stages.transition.tasks=[soft]",
        "tasks.soft.num_clusters=[2]",
    )
    config = make_config(*overrides)
    approve(site, config)
    soft = config.tasks["soft"]

    def refuse_changed(**changes: Any) -> str:
        tasks = config.tasks | {"soft": replace(soft, **changes)}
        return refusal_reason(join(site, replace(config, tasks=tasks)))

    assert isinstance(join(site, config), JoinReply)
    assert "clustering_id of task 'soft' is not this run's" in refuse_changed(
        clustering_id="another-run-soft"
    )
    for classes in (["0", "1", "2"], ["a", "b"]):
        assert "soft.classes are" in refuse_changed(classes=classes)


# --- the command ----------------------------------------------------------------------------------


def write_site(tmp_path: Path) -> str:
    (tmp_path / "site.yaml").write_text(f"centre: north\ndata: {tmp_path}\nstate: {tmp_path / 'state'}\n")
    return str(tmp_path / "site.yaml")


def run_approve(tmp_path: Path, *arguments: str, answer: str = "") -> str:
    result = CliRunner().invoke(app, ["approve", *arguments, "--site", write_site(tmp_path)], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def test_command_shows_what_a_recipe_does_and_approves_it_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    shown = run_approve(tmp_path, "triage", "privacy=secagg", answer="n\n")
    for words in (
        "task covid: yes or no; from the columns covid",
        "task lesion: a mask; from the columns lesion, severity",
        "8 rounds (passes over the training scans in each: 1) for covid, lesion",
        "masked: the coordinator sees the sum over hospitals only",
        "histograms of the scores in 256 bins",
        "no differential privacy",
        "the whole run: about",
    ):
        assert words in shown
    assert not read_approvals(tmp_path / "state")
    run_approve(tmp_path, "triage", "privacy=secagg", "--expires", "30", answer="y\n")
    (approval,) = read_approvals(tmp_path / "state").values()
    assert approval.digest in shown
    assert approval.expires == approval.approved + timedelta(days=30)
    assert f"{approval.digest}  triage: holds until" in run_approve(tmp_path, "--list")
    assert "triage: withdrawn on" in run_approve(tmp_path, "--withdraw", approval.digest[:8])


def test_file_of_the_coordinator_is_approved_like_the_recipe_composed_here(tmp_path: Path) -> None:
    from server.cli import app as server_app  # both commands, as their users run them

    printed = CliRunner().invoke(
        server_app, ["config", "--recipe", "prognosis", "privacy=patient privacy.epsilon=3"]
    )
    (tmp_path / "config.yaml").write_text(printed.output)
    shown = run_approve(tmp_path, str(tmp_path / "config.yaml"), "--yes")
    assert "patients are protected by epsilon 3 at delta 1e-05" in shown
    assert "classes by the edges 4, 9, 14" in shown
    (approval,) = read_approvals(tmp_path / "state").values()
    assert f"# digest for `consilium-centre approve`: {approval.digest}" in printed.output
    here = load_recipe("prognosis", ["federation=phantom", "privacy=patient", "privacy.epsilon=3"])
    assert compute_recipe_digest(here) == approval.digest


def test_wrong_file_and_wrong_day_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("- 1\n")
    with pytest.raises(ConsiliumError, match="cannot be read as a configuration"):
        load_recipe(str(tmp_path / "config.yaml"), [])
    with pytest.raises(ConsiliumError, match="FileNotFoundError"):
        load_recipe(str(tmp_path / "missing.yaml"), [])
    with pytest.raises(ConsiliumError, match="overrides go with a recipe's name"):
        load_recipe("config.yaml", ["seed=1"])
    for expires in ("soon", "99999999999", "2026-02-30"):
        with pytest.raises(ConsiliumError, match="write a day like 2027-06-30, or a number of days"):
            parse_expiry(expires, TODAY)
    with pytest.raises(ConsiliumError, match="would have expired"):
        parse_expiry("2020-01-01", TODAY)
    assert parse_expiry("2999-06-30", TODAY) == date(2999, 6, 30)
