"""`consilium-centre approve`: look at a recipe, and approve what it does by the digest of its content."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from common.utils.errors import ConsiliumError

if TYPE_CHECKING:
    from client.site.approvals import Approval
    from common.config.schema import Config

DEFAULT_DAYS = "180"  # that an approval holds
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
# A recipe does not depend on who takes part, but a configuration must name somebody.
EXAMPLE_FEDERATION = ("federation=folder", "federation.centres=[a,b,c,d,e,f,g,h,i]")


def approve(
    recipe: Annotated[
        str,
        typer.Argument(help="a recipe's name, or the config.yaml that the coordinator sent"),
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="the coordinator's, e.g. privacy=patient")
    ] = None,
    site: Annotated[Path, typer.Option(help="site.yaml")] = Path("/etc/consilium/site.yaml"),
    expires: Annotated[
        str, typer.Option(help="last day on which it holds, e.g. 2027-06-30, or a number of days")
    ] = DEFAULT_DAYS,
    withdraw: Annotated[
        str, typer.Option(metavar="DIGEST", help="withdraw an approval; its first 8 digits will do")
    ] = "",
    list_all: Annotated[bool, typer.Option("--list", help="list the approvals")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="approve without asking")] = False,
) -> None:
    """Show what a run of a recipe would compute, send and cost here, and approve it until a day.

    With `require_approval: true` in the policy, this hospital takes part in approved recipes only.
    """
    from client.site import approvals
    from client.site.config import cohort_state_dir, parse_site

    settings = parse_site({"site": str(site)})
    folder = cohort_state_dir(settings, Path(settings.data))
    today = date.today()
    if list_all:
        for approval in approvals.read_approvals(folder).values():
            typer.echo(f"{approval.digest}  {approval.recipe}: {approval.describe_state(today)}")
        return
    if withdraw:
        approval = approvals.withdraw_approval(folder, withdraw, today)
        typer.echo(f"{approval.digest}  {approval.recipe}: {approval.describe_state(today)}")
        return
    if not recipe:
        raise ConsiliumError(
            "name a recipe or give the coordinator's config.yaml; or use --list or --withdraw"
        )
    approval = _approve_recipe(load_recipe(recipe, overrides or []), parse_expiry(expires, today), yes)
    approvals.add_approval(folder, approval)
    typer.echo(f"approved until {approval.expires}; take it back with --withdraw {approval.digest[:12]}")


def _approve_recipe(config: Config, expires: date, yes: bool) -> Approval:
    from client.site.approvals import Approval
    from client.tools.recipe_summary import describe_recipe
    from common.config.recipe_digest import compute_recipe_digest

    digest = compute_recipe_digest(config)
    for line in describe_recipe(config):
        typer.echo(line)
    typer.echo(f"digest of all this: {digest}")
    if not yes:
        typer.confirm(f"approve it until {expires}?", abort=True)
    return Approval(digest, config.recipe, date.today(), expires)


def load_recipe(recipe: str, overrides: list[str]) -> Config:
    """Return a recipe's configuration: composed here, or read from the file that the coordinator sent.

    Raises:
        ConsiliumError: It cannot be read, or it is refused by the checks that every run must pass.
    """
    from common.config.compose import compose_config, prepare_config
    from common.config.parse import parse_config

    if not recipe.endswith(CONFIG_SUFFIXES):
        return compose_config([*_add_example_federation(overrides), f"recipe={recipe}", *overrides])
    if overrides:
        raise ConsiliumError("overrides go with a recipe's name; the coordinator's file has them already")
    try:
        values = yaml.safe_load(Path(recipe).read_text())
        if not isinstance(values, dict):
            raise TypeError(f"expected a mapping, got {type(values).__name__}")
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ConsiliumError(
            f"{recipe} cannot be read as a configuration ({type(error).__name__}); ask for another"
        ) from error
    return prepare_config(parse_config(values))


def _add_example_federation(overrides: list[str]) -> list[str]:
    """Return overrides for a federation as an example: a recipe's content does not depend on its centres."""
    keys = [override.partition("=")[0] for override in overrides]
    return [override for override in EXAMPLE_FEDERATION if override.partition("=")[0] not in keys]


def parse_expiry(expires: str, today: date) -> date:
    """Return the last day on which an approval holds, given as a day or as a number of days from today.

    Raises:
        ConsiliumError: It is neither, or has passed.
    """
    try:
        last_day = (
            today + timedelta(days=int(expires)) if expires.isdecimal() else date.fromisoformat(expires)
        )
    except (ValueError, OverflowError):
        raise ConsiliumError(
            f"--expires is '{expires}'; write a day like 2027-06-30, or a number of days"
        ) from None
    if last_day < today:
        raise ConsiliumError(f"an approval until {last_day} would have expired; give a later day")
    return last_day
