"""Which node answers for whom."""

from __future__ import annotations

from client.site import Site, name_of
from common.compose import compose


def test_in_central_mode_only_the_node_that_pools_answers() -> None:
    config = compose(["federation.mode=central"])
    assert [name_of(Site(index=i), config) for i in range(4)] == ["pooled", "", "", ""]
