"""Which node is which centre: the registered key decides, and else who came first."""

from __future__ import annotations

import pytest

from server.run.node_directory import NodeDirectory, WrongSender


def test_a_registered_key_decides_which_centre_a_node_is() -> None:
    directory = NodeDirectory()
    directory.note_registrations({1: "north", 2: "south", 3: ""})
    assert directory.identify(1, "north") == "north"
    assert directory.identify(2, "") == "south"
    with pytest.raises(WrongSender, match="registered under this name") as raised:
        directory.identify(2, "north")
    assert raised.value.centre == "south"
    # A key without a name cannot take one that belongs to another key, also before that one has joined.
    with pytest.raises(WrongSender, match="says that it is north, which is node 1") as raised:
        directory.identify(3, "north")
    assert raised.value.centre == "node 3"


def test_without_registered_names_the_first_node_keeps_a_name() -> None:
    directory = NodeDirectory()
    assert directory.identify(1, "north") == "north"
    directory.node_ids["north"] = 1
    with pytest.raises(WrongSender, match="says that it is north, which is node 1; that one remains north"):
        directory.identify(2, "north")
    assert directory.identify(1, "north") == "north"
    assert directory.identify(2, "south") == "south"


@pytest.mark.parametrize("name", ["north\0", "nor\nth", "n" * 101])
def test_impossible_names_are_nobodys(name: str) -> None:
    with pytest.raises(WrongSender, match="impossible name") as raised:
        NodeDirectory().identify(7, name)
    assert raised.value.centre == "node 7"


def test_impostors_neither_count_as_centres_nor_end_the_wait_for_them() -> None:
    directory = NodeDirectory(impostors={2, 3})
    assert not directory.is_exhausted(["north", "south"])
    assert directory.known_node_ids == {2, 3}
    directory.forget_expected(["north"])
    assert directory.known_node_ids == set()
