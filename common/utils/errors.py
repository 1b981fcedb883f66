"""Errors a person reads: one sentence naming the file, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum


class RefusalCode(StrEnum):
    """Why a request was not answered as asked. Travels with every refusal, so that nobody has to read its sentence."""

    OFFLINE = "offline"  # not connected, or no reply before the round timeout
    POLICY = "policy"  # the hospital's policy or privacy budget forbids it
    NO_DATA = "no_data"  # the centre has no scan, label or cohort for it
    BAD_REQUEST = "bad_request"  # the request or its configuration is wrong
    BAD_REPLY = "bad_reply"  # the reply could not be used: malformed, not finite, an outlier
    EXCLUDED = "excluded"  # an operator excluded the centre
    ERROR = "error"  # the centre failed; its own log has the details


class ConsiliumError(Exception):
    """Bad input. Its text is shown to a person as it is, without a stack trace.

    The text may travel to the coordinator: it never holds a path, a patient or a scan's name unless it is raised by a
    command that a person at the centre typed (`consilium-centre`), where the path is theirs to see.
    """


class Refused(ConsiliumError):
    """The centre will not answer this request; the text says why and is meant for the coordinator's operator."""

    def __init__(self, reason: str, code: RefusalCode = RefusalCode.BAD_REQUEST) -> None:
        """Refuse with a sentence for the coordinator's operator and a code for its programs."""
        super().__init__(reason)
        self.code = code


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
