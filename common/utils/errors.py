"""Errors a person reads: one sentence naming the file, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConsiliumError(Exception):
    """Bad input. Its text is shown to a person as it is, without a stack trace.

    The text may travel to the coordinator: it never holds a path, a patient or a scan's name unless it is raised by a
    command that a person at the centre typed (`consilium-centre`), where the path is theirs to see.
    """


class Refused(ConsiliumError):
    """The centre will not answer this request; the text says why and is meant for the coordinator's operator."""


class PermanentlyRefused(Refused):
    """The centre will not, and asking again is no use: the round does not wait for it."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """The sentence's tail that helps: ``"; did you mean 'covid'?"`` or ``"; valid: a, b, c"``."""
    names = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; valid: {shown}" if names else ""
