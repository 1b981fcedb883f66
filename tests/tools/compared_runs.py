"""The runs that both checkouts carry out, and the translation of their overrides into the new spelling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Keep the weights of the last round: on a dozen scans validation may find no round better than the start, and
# the initial weights are equal in any case.
LAST_ROUND = "evaluation.choose=last"
SMALL_PHANTOM = (
    "federation.phantom.scale=0.03",
    "federation.phantom.slices=12",
    "federation.phantom.pixels=64",
    "preprocess.size=32",
)


@dataclass(frozen=True)
class RunSpec:
    """A run that both checkouts carry out. Its overrides are in the old spelling."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    small: bool = True  # on the small phantom; false: on the one that `make simulate` makes
    killed: bool = False  # all of its processes get SIGKILL after the first round; then it is resumed

    @property
    def run_id(self) -> str:
        """The run's id in both checkouts."""
        return f"compare-{self.name}"

    @property
    def data_name(self) -> str:
        """The folder of the made-up hospitals that it reads."""
        return "data_small" if self.small else "data_default"

    @property
    def phantom_overrides(self) -> tuple[str, ...]:
        """The overrides that the made-up hospitals are written with."""
        return SMALL_PHANTOM if self.small else ()

    @property
    def all_overrides(self) -> tuple[str, ...]:
        """The run's overrides, and those that all small runs have."""
        return (*self.phantom_overrides, LAST_ROUND, *self.overrides) if self.small else self.overrides


RUNS = (
    # `make simulate` as it is. First, because it takes longest.
    RunSpec("multisource", "multisource", small=False),
    RunSpec(
        "triage",
        "triage",
        ("stage.rounds=2", "stage.epochs=1", "preprocess.slices=4", "tasks.covid.hidden=[32]"),
    ),
    # With soft labels: federated k-means, half of the encoder frozen, a second stage.
    RunSpec(
        "transfer",
        "transfer",
        (
            "stage.rounds=1",
            "stage.epochs=1",
            "stage.batch=8",
            "stages.transition.tasks=[soft]",
            "tasks.soft.clusters=[2,3]",
        ),
    ),
    # Severity first, then all heads, that of the regression too.
    RunSpec(
        "prognosis",
        "prognosis",
        (
            "stage.rounds=2",
            "stages.scores.rounds=1",
            "stages.main.tasks=[outcome,brixia,right,left,regions]",
            "stage.epochs=1",
            "stage.batch=8",
        ),
    ),
    # Momentum contrast, then classes and masks.
    RunSpec(
        "finegrained",
        "finegrained",
        ("stage.rounds=1", "stages.main.rounds=2", "stage.epochs=1", "stage.batch=8"),
    ),
    RunSpec("multisource_personal", "multisource_personal", ("stage.rounds=2", "stage.epochs=1")),
    RunSpec(
        "secagg",
        "multisource",
        (
            "privacy=secagg",
            "privacy.secagg.hide=all",
            "evaluation.over=pooled",
            "stage.rounds=2",
            "stage.epochs=1",
        ),
    ),
    # With an optimiser at the server, whose state must survive.
    RunSpec(
        "resumed",
        "multisource",
        ("aggregation=fedadam", "stage.rounds=8", "stage.epochs=1"),
        killed=True,
    ),
)


def translate_override(override: str, renames: Mapping[str, str]) -> str:
    """Return an override (`key=value`) in the new spelling; one that no rename applies to is unchanged."""
    key, _, value = override.partition("=")
    for pattern, replacement in renames.items():
        if "=" not in pattern:
            continue
        old_key, _, old_value = pattern.partition("=")
        new_key, _, new_value = replacement.partition("=")
        names = _match_key(key, old_key)
        if names is not None and old_value in ("", value):
            return f"{_restore_stage(_fill_names(new_key, names), key)}={new_value or value}"
    return f"{_translate_key(key, renames)}={value}"


def _translate_key(key: str, renames: Mapping[str, str]) -> str:
    """Rename a key by the rename that covers most of it; the parts below that stay."""
    parts = _generalise_stage(key).split(".")
    for length in range(len(parts), 0, -1):
        beginning, rest = ".".join(parts[:length]), parts[length:]
        for pattern, replacement in renames.items():
            names = _match_key(beginning, pattern)
            if names is not None:
                return _restore_stage(".".join([_fill_names(replacement, names), *rest]), key)
    return key


def _match_key(key: str, pattern: str) -> list[str] | None:
    """Return what the stars of a pattern stand for in a key; None where the pattern does not match."""
    parts = _generalise_stage(key).split(".")
    pattern_parts = pattern.split(".")
    if len(parts) != len(pattern_parts):
        return None
    names = []
    for part, pattern_part in zip(parts, pattern_parts, strict=True):
        if pattern_part == "*":
            names.append(part)
        elif pattern_part != part:
            return None
    return names


def _fill_names(pattern: str, names: Sequence[str]) -> str:
    """Return the pattern with each star replaced by its name."""
    remaining = iter(names)
    return ".".join(next(remaining) if part == "*" else part for part in pattern.split("."))


def _generalise_stage(key: str) -> str:
    """Return `stages.main.batch` as `stage.batch`, because renames hold for all stages."""
    parts = key.split(".")
    return ".".join(["stage", *parts[2:]]) if parts[0] == "stages" and len(parts) > 2 else key


def _restore_stage(new_key: str, key: str) -> str:
    """Undo `_generalise_stage` in a translated key."""
    parts = key.split(".")
    if parts[0] != "stages" or len(parts) <= 2:
        return new_key
    return f"stages.{parts[1]}.{new_key.removeprefix('stage.')}"
