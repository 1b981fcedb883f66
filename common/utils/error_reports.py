"""Report unexpected errors without any value: texts, arguments and local variables may identify a patient.

A person reads one sentence with the kind of the error and its place. The stack (modules, functions and line
numbers, no text) goes into a file on this machine. Texts that libraries log or warn of are withheld, because
they quote what they stumble over: a cell of a table, a name in a DICOM header.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

LOGGER_NAMES = ("consilium", "client", "common", "server")  # of this program's own loggers
REPORT_DIR_VARIABLE = "CONSILIUM_ERROR_DIR"


def describe_location(error: BaseException) -> str:
    """Return where an error was raised, without any value: "cohort.load_cohort, line 31"."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    return f"{Path(frames[-1].filename).stem}.{frames[-1].name}, line {frames[-1].lineno}"


def format_stack(error: BaseException) -> str:
    """Return the types of an error and its causes, and their stacks, without any value or text."""
    lines = []
    for link in _iterate_causes(error):
        lines.append(_full_type_name(link))
        for frame in traceback.extract_tb(link.__traceback__):
            lines.append(f"  {frame.filename}, line {frame.lineno}, in {frame.name}")
    return "\n".join(lines)


def report_unexpected_error(error: BaseException) -> str:
    """Write an error's stack to a file, and return the sentence about it."""
    sentence = f"unexpected {type(error).__name__} in {describe_location(error)}"
    try:
        return f"{sentence}; this is a defect: please report it with {_write_report(error)}"
    except OSError:
        return f"{sentence}; this is a defect, and no file for its details could be written"


def withhold_texts() -> None:
    """Keep values out of what this process prints about errors, warnings and libraries' log lines.

    Applies to errors that nothing catches in the main thread, in other threads and in destructors.
    """
    sys.excepthook = _report_uncaught
    threading.excepthook = _report_thread
    sys.unraisablehook = _report_unraisable
    warnings.showwarning = _show_warning_without_text
    handlers: list[logging.Handler] = []
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # a subclass may keep records for other uses
            handlers.append(handler)
    if logging.lastResort is not None:
        handlers.append(logging.lastResort)
    for handler in handlers:  # those that print to the terminal
        handler.addFilter(withhold_library_text)  # a second time has no effect


def withhold_library_text(record: logging.LogRecord) -> bool:
    """Replace the text of a library's log record; a logging filter that keeps every record."""
    if record.name.partition(".")[0] not in LOGGER_NAMES:
        record.msg = f"{record.levelname} of {record.name} (text withheld: it may identify a patient)"
        record.args = ()
    record.exc_info = None
    record.exc_text = None
    record.stack_info = None
    return True


def _report_uncaught(kind: type[BaseException], error: BaseException, stack: TracebackType | None) -> None:
    _print_line(f"error: {report_unexpected_error(error.with_traceback(stack))}")


def _report_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
        _print_line(f"error in a thread: {report_unexpected_error(arguments.exc_value)}")


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    error = unraisable.exc_value
    if error is not None and not isinstance(error, BrokenPipeError):  # whoever read our output has gone
        _print_line(f"error in a destructor: {type(error).__name__} in {describe_location(error)}")


def _show_warning_without_text(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Print where a warning comes from; takes the arguments of `warnings.showwarning`."""
    place = f"{Path(filename).parent.name}/{Path(filename).name}, line {lineno}"
    _print_line(f"{category.__name__} in {place} (text withheld: it may identify a patient)")


def _print_line(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr)


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then what caused it, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _full_type_name(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _write_report(error: BaseException) -> Path:
    """Write a file that only this user can read, and return its path.

    Raises:
        OSError: No folder can be written.
    """
    time = datetime.now(UTC)
    text = f"{time.isoformat(timespec='seconds')}\n{format_stack(error)}\n"
    name = f"consilium-error-{time.strftime('%Y%m%dT%H%M%S')}-"
    folder = os.environ.get(REPORT_DIR_VARIABLE) or tempfile.gettempdir()
    os.makedirs(folder, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", prefix=name, suffix=".log", dir=folder, delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    return Path(file.name)
