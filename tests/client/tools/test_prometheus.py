"""A centre's own metrics, from its state folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from client.cli import app
from client.site import egress_anchor, egress_log, privacy_budget
from common.modeling.parameters import EMPTY_PARAMS, Weights
from common.privacy.accountant import Charge, compute_epsilon
from common.protocol.messages import StatisticsReply, StatisticsRequest, TrainRequest


def test_metrics_show_what_left_and_what_was_spent(tmp_path: Path) -> None:
    data = tmp_path / "data"
    state = tmp_path / "state"
    data.mkdir()
    (data / "cohort.csv").write_text(
        "scan,path,patient,split,source,covid\na,a,secret-1,train,x,1\nb,b,secret-2,val,x,0\n"
    )
    (tmp_path / "policy.yaml").write_text("epsilon: 8\ndelta: 1.0e-5\n")
    (tmp_path / "site.yaml").write_text(
        f"centre: north\ndata: {data}\nstate: {state}\npolicy: {tmp_path}/policy.yaml\n"
    )
    for _ in range(2):
        egress_log.record_reply(
            state,
            StatisticsRequest("r", {}, "counts", ""),
            StatisticsReply("north", {"north/train/covid": np.array([1.0, 0, 0])}),
        )
    account = privacy_budget.PrivacyAccount(
        state / "budget", privacy_budget.hash_patients(["secret-1"]), 8, 1e-5
    )
    charge = Charge(noise_multiplier=1.0, sampling_rate=0.1, steps=100)
    privacy_budget.record_charge(
        account, charge, TrainRequest("r", {}, "main", 1, Weights(EMPTY_PARAMS, np.empty(0, np.int64)))
    )

    def read() -> dict[str, float]:
        arguments = ["metrics", "--site", str(tmp_path / "site.yaml"), "--out", str(tmp_path / "c.prom")]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        text = (tmp_path / "c.prom").read_text()
        assert "secret" not in text
        assert str(tmp_path) not in text
        values = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = " ".join([sample.name, *sample.labels.values()])
                values[name.removeprefix("consilium_centre_")] = sample.value
        return values

    metrics = read()
    assert metrics["egress_messages_total StatisticsReply counts"] == 2
    assert metrics["egress_bytes_total StatisticsReply counts"] == sum(
        entry.bytes for entry in egress_log.read_entries(state)
    )
    assert metrics["egress_chain_whole"] == 1
    assert metrics["privacy_epsilon"] == pytest.approx(compute_epsilon((charge,), 1e-5))
    assert (metrics["privacy_epsilon_limit"], metrics["cohort_scans val"]) == (8, 1)
    log = state / egress_anchor.LOG_FILENAME
    log.write_text(log.read_text().replace('"counts"', '"scores"', 1))
    assert read()["egress_chain_whole"] == 0
