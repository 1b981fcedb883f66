"""The image's `flwr-clientapp` for a machine with few cores: fork each process from one with PyTorch loaded.

The fork executes the image's file unchanged, in a process of its own, which can be stopped and killed like
any other. Only the ten seconds of loading are saved, four times a message. Run as a script, this is the
process to fork from; it listens on a socket in its working directory.
"""

from __future__ import annotations

import os
import socket
import sys
import time

SOCKET_NAME = "warm.sock"


def request_fork(arguments: list[str]) -> int:
    """Have a process forked with these arguments and our output, and return its exit status.

    Imports nothing that takes time.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        while True:
            try:
                connection.connect(SOCKET_NAME)
                break
            except OSError:
                time.sleep(0.2)
        socket.send_fds(connection, ["\0".join(arguments).encode()], [1, 2])
        return int(connection.recv(16) or b"1")


def serve_forks() -> None:
    """Load PyTorch, then fork a process for each request."""
    import flwr.supernode.cli  # noqa: F401

    import client.app  # noqa: F401

    if os.path.exists(SOCKET_NAME):
        os.unlink(SOCKET_NAME)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(SOCKET_NAME)
        server.listen(8)
        children: list[int] = []
        while True:
            connection, _ = server.accept()
            child = os.fork()
            if child == 0:
                execute_and_report(server, connection)
            connection.close()
            children = [pid for pid in [*children, child] if os.waitpid(pid, os.WNOHANG)[0] == 0]


def execute_and_report(server: socket.socket, connection: socket.socket) -> None:
    """Fork a process that does the work, report its exit status, and end."""
    if os.fork() == 0:
        server.close()
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 2)
        execute_file(message.decode().split("\0"), descriptors)
    _, status = os.wait()
    connection.sendall(str(os.waitstatus_to_exitcode(status) & 255).encode())
    os._exit(0)


def execute_file(arguments: list[str], output_descriptors: list[int]) -> None:
    """Execute a Python file as `__main__` with the given arguments and output, and end the process."""
    for number, descriptor in enumerate(output_descriptors, 1):
        os.dup2(descriptor, number)
    sys.argv = arguments
    status = 1
    try:
        with open(arguments[0]) as file:
            code = compile(file.read(), arguments[0], "exec")
        exec(code, {"__name__": "__main__", "__file__": arguments[0]})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve_forks()
