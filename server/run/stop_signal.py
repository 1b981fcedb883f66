"""A flag that SIGINT and SIGTERM set and that the round loop polls, so that no signal handler raises."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from server.run.run_state import RunPaused

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Whether this process was asked to end: by a person, a container, or Flower."""

    def __init__(self) -> None:
        """Begin unset."""
        self._received: signal.Signals | None = None

    def set(self, received: signal.Signals) -> None:
        """Note the signal; called by the handler."""
        self._received = received

    def raise_if_set(self) -> None:
        """Raise RunPaused when a signal has come, so that the ledger says so and the run can be resumed."""
        if self._received is not None:
            raise RunPaused(
                f"its process was asked to end ({self._received.name}): by a person, "
                "or by a SuperLink that was unreachable for long"
            )

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Handle the signals inside the block. Without effect outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous_handlers = {}
        for number in STOP_SIGNALS:
            previous_handlers[number] = signal.signal(number, lambda n, _: self.set(signal.Signals(n)))
        try:
            yield
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)
