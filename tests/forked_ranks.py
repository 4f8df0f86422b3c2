"""Ranks of a distributed run, forked from one process: ``python -m tests.forked_ranks SIZE MODULE ARGS...``.

Each runs a module with the environment that torchrun gives it. Under ``tests.forks`` torch is imported by then, which
takes longer than what the ranks do.
"""

import os
import runpy
import socket
import sys

__all__: list[str] = []


def become(rank, size, port, argv):
    """Runs a module as one rank."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size)
    )
    sys.argv = ["-m", *argv[1:]]
    runpy._run_module_as_main(argv[0])


if __name__ == "__main__":
    size, argv = int(sys.argv[1]), sys.argv[2:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = []
    for rank in range(1, size):
        pid = os.fork()
        if pid == 0:
            become(rank, size, port, argv)
            sys.exit()
        others.append(pid)
    try:
        become(0, size, port, argv)
    finally:
        failed = [pid for pid in others if os.waitpid(pid, 0)[1]]
    sys.exit(bool(failed))
