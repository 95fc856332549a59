"""`python -m tests.as_fork MODULE ...`, for launchers: a module that starts in 0.1 s, not 15 s.

This process only stands for it, with its environment, input, output, exit status and death. The
fork server of the tests runs the module; see `launcher_environment` in helpers_ranks.
"""

import os
import signal
import sys
from multiprocessing.connection import Client
from multiprocessing.reduction import send_handle

ADDRESS, PYTHON = "TESTS_FORK_ADDRESS", "TESTS_FORK_PYTHON"

if __name__ == "__main__":
    with Client(os.environ[ADDRESS], "AF_UNIX") as connection:
        connection.send((dict(os.environ), sys.argv[1:]))
        for descriptor in range(3):
            send_handle(connection, descriptor, None)
        status = connection.recv()
    if status < 0:
        os.kill(os.getpid(), -status)
        signal.pause()
    sys.exit(status)
