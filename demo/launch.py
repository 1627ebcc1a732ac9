"""Runs demo/run.py in two processes that train together; `torchrun --nproc_per_node 2` does the same, seconds later.

Two, because the toy's layers are too small to be shared out over cores. Arguments are passed on.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

PROCESSES = 2


def main():
    """Exit status: that of the first process to fail; the other is ended with it."""
    here = Path(__file__).resolve().parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(max(1, os.cpu_count() // PROCESSES))}
    world |= {"PYTHONPATH": str(here.parent), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(here / "run.py"), *sys.argv[1:]]
    running = [
        subprocess.Popen(command, env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(PROCESSES)
    ]
    status = 0
    try:
        while running and not status:
            time.sleep(0.1)
            status = next((p.returncode for p in running if p.poll()), 0)
            running = [p for p in running if p.returncode is None]
    finally:
        for process in running:
            process.kill()
    return status


if __name__ == "__main__":
    sys.exit(main())
