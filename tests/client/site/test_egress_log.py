"""The log of what left the hospital is complete, chained, and without content."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from client.site import egress_anchor, egress_log
from common.protocol.messages import StatisticsReply, StatisticsRequest
from common.utils.errors import ConsiliumError, Refused
from common.utils.hash_chain import GENESIS_HASH, append_hash


def record(folder: Path, value: float, centre: str = "north") -> None:
    """Record a reply to a query for scores."""
    egress_log.record_reply(
        folder,
        StatisticsRequest("r1", {}, "scores", "main"),
        StatisticsReply(centre, {f"{centre}/covid/hist": np.full((2, 4), value)}),
    )


def test_each_message_has_a_line_without_content(tmp_path: Path) -> None:
    for value in (1.25, 2.5):
        record(tmp_path, value)
    first, second = egress_log.read_entries(tmp_path)
    assert (first.run, first.kind, first.query, first.stage) == ("r1", "StatisticsReply", "scores", "main")
    assert first.fields["sums/north/covid/hist"] == "float64[2, 4]"
    assert first.bytes >= 64
    assert first.digest != second.digest
    assert second.previous == first.hash
    assert "1.25" not in (tmp_path / egress_anchor.LOG_FILENAME).read_text()


def test_log_of_the_previous_version_is_read_and_continued(tmp_path: Path) -> None:
    """Its keys have stayed the same."""
    old_entry = {
        "time": "2026-01-01T12:00:00+00:00",
        "run": "old",
        "stage": "main",
        "round": 3,
        "kind": "Contribution",
        "query": "",
        "fields": {"change": "float32[5]", "facts": ["centre", "kind"]},
        "bytes": 20,
        "digest": "ab",
    }
    line = json.dumps(append_hash(old_entry, GENESIS_HASH), sort_keys=True)
    (tmp_path / egress_anchor.LOG_FILENAME).write_text(f"{line}\n")
    record(tmp_path, 1.0)
    old, new = egress_log.read_entries(tmp_path)
    assert (old.run, old.round, old.kind) == ("old", 3, "Contribution")
    assert next(egress_log.read_lines(tmp_path)).hash == old.hash
    assert new.previous != old.hash  # between them a line says that the log has anchors from there on
    keys = json.loads((tmp_path / egress_anchor.LOG_FILENAME).read_text().splitlines()[1]).keys()
    assert keys == old_entry.keys() | {"previous", "hash"}


@pytest.mark.parametrize("harm", ["changed", "removed", "swapped", "forged"])
def test_tampering_is_found_at_its_line(tmp_path: Path, harm: str) -> None:
    for value in range(4):
        record(tmp_path, value)
    path = tmp_path / egress_anchor.LOG_FILENAME
    lines = path.read_text().splitlines()
    bad_line = 2
    if harm == "changed":
        lines[1] = lines[1].replace('"bytes": ', '"bytes": 1')
    elif harm == "removed":
        del lines[1]
    elif harm == "swapped":
        lines[1], lines[2] = lines[2], lines[1]
    else:  # rewritten with a hash of its own: the next line does not follow from it
        entry = json.loads(lines[1]) | {"bytes": 0}
        lines[1] = json.dumps(append_hash(entry, entry["previous"]), sort_keys=True)
        bad_line = 3
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConsiliumError, match=f"line {bad_line} was changed, or lines before it were removed"):
        list(egress_log.read_entries(tmp_path))


def test_concurrent_writers_make_one_chain(tmp_path: Path) -> None:
    def record_long_line(number: int) -> None:
        """Lines longer than what is read at first are read back too."""
        record(tmp_path, number, f"a{'b' * 200}{number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(record_long_line, range(40)))
    assert len(list(egress_log.read_entries(tmp_path))) == 40


def test_nothing_leaves_that_cannot_be_recorded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="nothing leaves unrecorded"):
        record(tmp_path / "file", 1.0)
    (tmp_path / egress_anchor.LOG_FILENAME).write_text("torn {\n")
    with pytest.raises(Refused, match="nothing leaves unrecorded"):
        record(tmp_path, 1.0)
    with pytest.raises(ConsiliumError, match="does not exist"):
        list(egress_log.read_entries(tmp_path / "nowhere"))


def test_incomplete_last_line_is_removed(tmp_path: Path) -> None:
    """A full disk or a power failure has cut it short; its message never left."""
    for num_complete in (0, 1, 2):
        with (tmp_path / egress_anchor.LOG_FILENAME).open("ab") as log:
            log.write(b'{"bytes": 12, "da')
        record(tmp_path, num_complete)
        assert len(list(egress_log.read_entries(tmp_path))) == num_complete + 1
