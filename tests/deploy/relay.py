"""A TCP relay that can be cut: what is between a hospital and the coordinator, without the rights that network namespaces need."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading


def main(listen: int, to: int) -> None:
    """Pass every connection to the port `listen` on to the port `to`, until killed: a cable that is pulled out."""
    with socket.create_server(("127.0.0.1", listen)) as server:
        while True:
            near, _ = server.accept()
            try:
                far = socket.create_connection(("127.0.0.1", to))
            except OSError:
                near.close()
                continue
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=pump, args=(a, b), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
