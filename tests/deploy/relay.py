"""A TCP relay that can be cut: the line between a hospital and the coordinator.

Network namespaces would do the same, but need privileges.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading


def relay_connections(listen_port: int, target_port: int) -> None:
    """Relay every connection to one local port on to another, until killed."""
    with socket.create_server(("127.0.0.1", listen_port)) as server:
        while True:
            client, _ = server.accept()
            try:
                target = socket.create_connection(("127.0.0.1", target_port))
            except OSError:
                client.close()
                continue
            for source, sink in ((client, target), (target, client)):
                threading.Thread(target=copy_stream, args=(source, sink), daemon=True).start()


def copy_stream(source: socket.socket, sink: socket.socket) -> None:
    """Copy what comes from one socket to another until either side closes."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    relay_connections(int(sys.argv[1]), int(sys.argv[2]))
