"""Define the errors that a person reads: one sentence with the file or setting, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum

MAX_SUGGESTIONS = 12


class RefusalCode(StrEnum):
    """Why a request was not answered as asked. Programs read this code, never a refusal's text."""

    OFFLINE = "offline"  # not connected, or no reply before the round timeout
    POLICY = "policy"  # the hospital's policy or privacy budget forbids it
    NO_DATA = "no_data"  # the centre has no scan, label or cohort for it
    BAD_REQUEST = "bad_request"  # the request or its configuration is wrong
    BAD_REPLY = "bad_reply"  # the reply could not be used: malformed, not finite, an outlier
    EXCLUDED = "excluded"  # an operator excluded the centre
    ERROR = "error"  # the centre failed; its own log has the details


class ConsiliumError(Exception):
    """An error in the input. Its text is shown as it is, without a stack trace.

    The text may travel to the coordinator, so it must not contain a path or the name of a patient or scan.
    The only exception is a command that a person at the centre runs (`consilium-centre`), who may see the
    path.
    """


class Refused(ConsiliumError):
    """The centre declines a request; the text says why and is for the coordinator's operator."""

    def __init__(self, reason: str, code: RefusalCode = RefusalCode.BAD_REQUEST) -> None:
        """Refuse with a sentence for the coordinator's operator and a code for its programs."""
        super().__init__(reason)
        self.code = code


class PermanentlyRefused(Refused):
    """The centre will decline every repetition of the request, so the round does not wait for it."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return the end of an error message: ``"; did you mean 'covid'?"`` or ``"; valid: a, b, c"``."""
    names = sorted(map(str, valid))
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if matches:
        return f"; did you mean '{matches[0]}'?"
    if not names:
        return ""
    listed = ", ".join(names[:MAX_SUGGESTIONS])
    if len(names) > MAX_SUGGESTIONS:
        listed += ", ..."
    return f"; valid: {listed}"
