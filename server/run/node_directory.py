"""Which node is which centre. The transport says who sent a reply, and no message can say otherwise.

In a deployed federation a centre's public key is registered at the SuperLink under the centre's name
(server/operations/superlink.py), and the SuperLink authenticates the node by that key: the registered name is
the centre's. A simulation's nodes have no names: there a node is the centre that it first says it is, and no
other node can be that centre.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from server.run.reply_fields import is_plain


class WrongSender(Exception):
    """A node says that it is a centre which it is not. The text is for the coordinator's operator."""

    def __init__(self, centre: str, reason: str) -> None:
        """Refuse a node that is known as `centre`, with a sentence."""
        super().__init__(reason)
        self.centre = centre


@dataclass
class NodeDirectory:
    """Which node is which centre, as far as a run has found out."""

    run_id: str = ""  # every run of a cross-validation asks the nodes anew
    node_ids: dict[str, int] = field(default_factory=dict)  # by centre
    ineligible: set[int] = field(default_factory=set)  # nodes that have no part in this run
    impostors: set[int] = field(default_factory=set)  # nodes that say they are a centre which they are not
    registered_names: dict[int, str] = field(default_factory=dict)  # {node: the centre of its key}

    @property
    def known_node_ids(self) -> set[int]:
        """The nodes that have replied, and need not be asked again."""
        return {*self.node_ids.values(), *self.ineligible, *self.impostors}

    def note_registrations(self, names: Mapping[int, str]) -> None:
        """Note under which names the SuperLink has registered the keys of nodes."""
        self.registered_names |= {node: name for node, name in names.items() if name}

    def identify(self, node: int, claimed_name: str) -> str:
        """Return which centre a node is.

        Args:
            node: the node that sent a reply.
            claimed_name: the centre that the reply names as its sender; may be empty.

        Raises:
            WrongSender: the node's key is registered for another centre, or the centre is another node.
        """
        unnamed = f"node {node}"
        name = self.registered_names.get(node, "")
        if name and claimed_name not in ("", name):
            raise WrongSender(
                name,
                "its key is registered under this name, and it says that it is another centre; "
                "set `centre` in its site.yaml, or register the key under the other name",
            )
        name = name or claimed_name
        if not name:
            return unnamed
        if not is_plain(name):
            raise WrongSender(unnamed, "it says that it is a centre with an impossible name")
        holder = self._find_holder(name, node)
        if holder is not None:
            raise WrongSender(
                unnamed,
                f"it says that it is {name}, which is node {holder}; that one remains {name}. Find out which "
                "of the two is right, and revoke the other's key",
            )
        return name

    def _find_holder(self, name: str, node: int) -> int | None:
        """Return the other node that is the centre of this name; None where there is none."""
        joined = self.node_ids.get(name, node)
        if joined != node:
            return joined
        for other, registered_name in self.registered_names.items():
            if registered_name == name and other != node and node not in self.registered_names:
                return other
        return None

    def forget_expected(self, expected: list[str]) -> None:
        """Ask again who was refused or is expected again: the fault may have been remedied since."""
        self.ineligible.clear()
        self.impostors.clear()
        for centre in expected:
            self.node_ids.pop(centre, None)

    def has_all(self, expected: list[str]) -> bool:
        """Return whether every expected centre has a node."""
        return all(centre in self.node_ids for centre in expected)

    def is_exhausted(self, expected: list[str]) -> bool:
        """Return whether as many nodes have replied as are expected, some of which decline."""
        num_replied = len(self.node_ids) + len(self.ineligible)
        return bool(self.ineligible) and num_replied >= len(expected)
