"""The image's `flwr-clientapp` for a machine with few cores: each message's process is forked from one that has PyTorch loaded already.

What is forked runs the image's file as it stands, in a process of its own, which may be stopped and killed like any other; only the ten seconds of
loading are saved, four times a message. Run by itself it is the loaded one that listens on a socket in its working directory.
"""

from __future__ import annotations

import os
import socket
import sys
import time

HERE = "warm.sock"


def ask(arguments: list[str]) -> int:
    """Have a process forked with these arguments and our output; returns its exit status. Nothing that takes time is imported for this."""
    with socket.socket(socket.AF_UNIX) as near:
        while True:
            try:
                near.connect(HERE)
                break
            except OSError:
                time.sleep(0.2)
        socket.send_fds(near, ["\0".join(arguments).encode()], [1, 2])
        return int(near.recv(16) or b"1")


def serve() -> None:
    import flwr.supernode.cli  # noqa: F401

    import client.app  # noqa: F401

    if os.path.exists(HERE):
        os.unlink(HERE)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(HERE)
        server.listen(8)
        children: list[int] = []
        while True:
            far, _ = server.accept()
            if child := os.fork():
                far.close()
                children = [c for c in [*children, child] if os.waitpid(c, os.WNOHANG)[0] == 0]
                continue
            if os.fork() == 0:  # this one does the work, its parent tells how it ended
                server.close()
                sent, fds, _, _ = socket.recv_fds(far, 1 << 16, 2)
                work(sent.decode().split("\0"), fds)
            _, status = os.wait()
            far.sendall(str(os.waitstatus_to_exitcode(status) & 255).encode())
            os._exit(0)


def work(arguments: list[str], output: list[int]) -> None:
    for number, fd in enumerate(output, 1):
        os.dup2(fd, number)
    sys.argv = arguments
    status = 1
    try:
        with open(arguments[0]) as file:
            code = compile(file.read(), arguments[0], "exec")
        exec(code, {"__name__": "__main__", "__file__": arguments[0]})
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
