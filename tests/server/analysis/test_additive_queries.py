"""Sums from replies, also from those of a faulty centre."""

from __future__ import annotations

import numpy as np

from server.analysis.additive_queries import select_by_cohort


def test_a_statistic_is_selected_in_the_order_of_the_keys() -> None:
    sums = {
        "south/covid/hist": np.array([1.0]),
        "north/covid/hist": np.array([2.0]),
        "north/covid/loss": np.array([3.0]),
        "north/source/hist": np.array([4.0]),
    }
    histograms = select_by_cohort(sums, "covid", "hist")
    assert list(histograms) == ["north", "south"]
    assert histograms["north"] == 2
