"""What a centre knows of the run that a request belongs to.

A run's configuration is parsed once a process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.site.config import Site, local_cohorts, outer_anchor, reply_name, state_dir
from client.site.policy import Policy
from common.config.compose import prepare_config
from common.config.parse import parse_config
from common.config.schema import Config, Stage
from common.utils.errors import ConsiliumError, Refused, suggest

MAX_ERROR_LENGTH = 300  # of an error's text in a refusal
MAX_CACHED_CONFIGS = 4  # a process serves one run or a few folds of it
_parsed_configs: dict[str, Config] = {}  # {digest of a configuration's text: the configuration}


@dataclass(frozen=True)
class RunContext:
    """A run as this centre takes part in it."""

    site: Site  # with the smallest cell that the policy allows
    config: Config
    policy: Policy  # as its file reads now: the hospital may change it during a run
    run_id: str

    @property
    def centre(self) -> str:
        """Return the name under which the centre replies."""
        return reply_name(self.site, self.config)

    @property
    def state_dir(self) -> Path:
        """Return the centre's state folder."""
        return state_dir(self.site, self.config)

    @property
    def outer_anchor(self) -> Path | None:
        """Return the file outside the state folder that remembers the end of the egress log, if any."""
        first_cohort = next(iter(local_cohorts(self.site, self.config).values()))
        return outer_anchor(self.site, first_cohort)

    @property
    def budget_dir(self) -> Path:
        """Return the folder of the patients' privacy budget, and of what else their privacy depends on."""
        return self.state_dir / "budget"

    @property
    def local_layers_dir(self) -> Path:
        """Return the folder of the layers that stay at the centre; pooled cohorts have one of their own."""
        is_central = self.config.federation.mode == "central"
        return self.state_dir / ("pooled" if is_central else "personal")

    def find_stage(self, name: str) -> Stage:
        """Return a stage of the recipe; the first for an empty name. Raises Refused for an unknown name."""
        stages = self.config.stages
        if not name:
            return next(iter(stages.values()))
        if name not in stages:
            raise Refused(f"this run has no stage '{name}'{suggest(name, stages)}")
        return stages[name]


def parse_run_config(values: Mapping[str, Any]) -> Config:
    """Return the configuration of a request, validated as the coordinator validates its own.

    Every request of a run carries the same configuration, which is parsed when it comes for the first time.

    Raises:
        Refused: The configuration is wrong, contradicts itself, or lacks what follows from it: a coordinator
            that prepared it with the same code sends no such one.
    """
    try:
        text = json.dumps(values)  # keys in their order: the order of the tasks matters
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"the run's configuration is not JSON ({type(error).__name__})") from error
    digest = hashlib.sha256(text.encode()).hexdigest()
    config = _parsed_configs.get(digest)
    if config is None:
        config = _validate_config(values)
        if len(_parsed_configs) >= MAX_CACHED_CONFIGS:
            _parsed_configs.clear()
        _parsed_configs[digest] = config
    return config


def _validate_config(values: Mapping[str, Any]) -> Config:
    try:
        config = parse_config(values)
        prepared = prepare_config(config)
    except ConsiliumError as error:  # about the coordinator's own settings, so it may know the text
        raise Refused(f"the run's configuration is refused: {str(error)[:MAX_ERROR_LENGTH]}") from error
    if prepared != config:
        raise Refused(
            "the run's configuration is refused: it lacks what follows from its settings; "
            "send it as `consilium-server config` prints it"
        )
    return config
