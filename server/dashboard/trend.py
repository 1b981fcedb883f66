"""How a run's validation scores develop: the last scored round against one some rounds before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.monitoring.run_history import ScoreHistory, ScorePoint
from server.reporting.labels import View

TREND_ROUNDS = 5  # rounds back
TREND_VIEWS = (View.MACRO, View.WORST, View.SPREAD)


@dataclass(frozen=True)
class Trend:
    """The last scored round, and what changed since an earlier one."""

    now: ScorePoint
    changes: dict[View, float | None]  # None: undefined in one of the two rounds
    num_rounds: int | None  # between the two; None: the earlier one belongs to another stage


def summarise_trend(history: ScoreHistory) -> Trend | None:
    """Return the trend of a run's scores; None before the first score."""
    points = [point for point in history.points if point.macro is not None]
    if not points:
        return None
    now = points[-1]
    earlier = _find_earlier_point(points)
    num_rounds = None
    if now.stage == earlier.stage:
        num_rounds = now.round - earlier.round
    return Trend(now, {view: _compute_change(earlier, now, view) for view in TREND_VIEWS}, num_rounds)


def _find_earlier_point(points: Sequence[ScorePoint]) -> ScorePoint:
    """Return the last point of the same stage that is `TREND_ROUNDS` back, or else the first of all."""
    now = points[-1]
    for point in reversed(points):
        if point.stage == now.stage and point.round <= now.round - TREND_ROUNDS:
            return point
    return points[0]


def _compute_change(earlier: ScorePoint, now: ScorePoint, view: View) -> float | None:
    old_value: float | None = getattr(earlier, view)
    new_value: float | None = getattr(now, view)
    if earlier is now or old_value is None or new_value is None:
        return None
    return new_value - old_value
