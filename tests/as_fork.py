"""`python -m tests.as_fork`, for launchers: a stage that starts in 0.1 s instead of 15 s.

This process only stands for the rank, with its environment, output, exit status and death. The fork
server of the tests runs the stage that `MODULE` names; see `launcher_environment` in helpers_ranks.
"""

import os
import signal
import sys
from multiprocessing.connection import Client
from multiprocessing.reduction import send_handle

ADDRESS, MODULE = "TESTS_FORK_ADDRESS", "TESTS_FORK_MODULE"

if __name__ == "__main__":
    with Client(os.environ[ADDRESS], "AF_UNIX") as connection:
        connection.send((dict(os.environ), sys.argv[1:]))
        for descriptor in (1, 2):
            send_handle(connection, descriptor, None)
        status = connection.recv()
    if status < 0:
        os.kill(os.getpid(), -status)
        signal.pause()
    sys.exit(status)
