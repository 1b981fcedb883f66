"""The log of what left: whole, chained, without content."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from client.site import egress_log
from common.protocol.messages import StatisticsReply, StatisticsRequest
from common.utils.errors import ConsiliumError, Refused
from common.utils.hash_chain import append_hash


def send(folder: Path, value: float, centre: str = "north") -> None:
    egress_log.record_reply(
        folder,
        StatisticsRequest("r1", {}, "scores", "main"),
        StatisticsReply(centre, {f"{centre}/covid/hist": np.full((2, 4), value)}),
    )


def test_each_message_is_a_line_without_content(tmp_path: Path) -> None:
    for value in (1.25, 2.5):
        send(tmp_path, value)
    first, second = egress_log.read_entries(tmp_path)
    assert (first["run"], first["kind"], first["query"], first["stage"]) == (
        "r1",
        "StatisticsReply",
        "scores",
        "main",
    )
    assert first["fields"]["sums/north/covid/hist"] == "float64[2, 4]"
    assert first["bytes"] >= 64
    assert first["digest"] != second["digest"]
    assert second["previous"] == first["hash"]
    assert "1.25" not in (tmp_path / egress_log.LOG_FILENAME).read_text()


@pytest.mark.parametrize("harm", ["changed", "removed", "swapped", "forged"])
def test_a_line_that_was_tampered_with_is_named(tmp_path: Path, harm: str) -> None:
    for value in range(4):
        send(tmp_path, value)
    path = tmp_path / egress_log.LOG_FILENAME
    lines = path.read_text().splitlines()
    if harm == "changed":
        lines[1] = lines[1].replace('"bytes": ', '"bytes": 1')
    elif harm == "removed":
        del lines[1]
    elif harm == "swapped":
        lines[1], lines[2] = lines[2], lines[1]
    else:  # rewritten with a hash of its own: the next line does not follow from it
        entry = json.loads(lines[1]) | {"bytes": 0}
        lines[1] = json.dumps(append_hash(entry, entry["previous"]), sort_keys=True)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ConsiliumError,
        match=f"line {3 if harm == 'forged' else 2} was changed, or lines before it were removed",
    ):
        list(egress_log.read_entries(tmp_path))


def test_many_at_once_make_one_chain(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda k: send(tmp_path, k, f"a{'b' * 200}{k}"), range(40))
        )  # lines longer than a block are read back too
    assert len(list(egress_log.read_entries(tmp_path))) == 40


def test_what_cannot_be_recorded_does_not_leave(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="what is not recorded does not leave"):
        send(tmp_path / "file", 1.0)
    (tmp_path / egress_log.LOG_FILENAME).write_text("torn {\n")
    with pytest.raises(Refused, match="what is not recorded does not leave"):
        send(tmp_path, 1.0)
    with pytest.raises(ConsiliumError, match="is not there"):
        list(egress_log.read_entries(tmp_path / "nowhere"))


def test_a_line_that_was_cut_short_makes_way(tmp_path: Path) -> None:
    """By a full disk or a power cut: its message never left."""
    for whole in (0, 1, 2):
        with (tmp_path / egress_log.LOG_FILENAME).open("ab") as log:
            log.write(b'{"bytes": 12, "da')
        send(tmp_path, whole)
        assert len(list(egress_log.read_entries(tmp_path))) == whole + 1
