"""Every process of a run notices when another one dies, hangs or fails, and ends as well.

Collectives notice late: with NCCL after ten minutes, with gloo after half an hour where a process
hangs or its machine is gone. So each process keeps a plain TCP connection to rank 0, on which both
ends are heard every second, whatever their main threads do. A connection that closes without a
farewell is a process that was killed; silence is one that hangs; a process that fails says why.
Rank 0 hands on the first of these, and every other process prints it and ends.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

BEAT_S = 1.0
"""A process says this often that it is there."""
JOIN_S = 300.0
"""How long the processes wait for each other at the start."""
GRACE_S = 3.0
"""How long an error of a collective waits for news of the process that may be its cause."""
KEY = "balanceddpo/watch"
"""Where the launcher's store has rank 0's port."""


class JoinError(ValueError):
    """The processes did not find each other."""


@dataclass(slots=True, eq=False)
class Link:
    """A connection to another process."""

    socket: socket.socket
    who: str = ""
    """Rank, process id and machine; empty until the other has said it, and the run's token."""
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something; that the other is gone is noticed by reading."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def messages(self) -> Iterator[dict[str, Any]]:
        """What was said meanwhile; `gone` when the connection is closed."""
        try:
            found = self.socket.recv(1 << 16)
        except OSError:
            found = b""
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + found).split(b"\n")
        try:
            yield from (dict(json.loads(line)) for line in lines)
        except (ValueError, TypeError):
            found = b""  # a stranger's
        if not found:
            yield {"gone": True}


class Watch:
    """An eye on the other processes: rank 0 has a link to each, each has one to rank 0."""

    def __init__(self, rank: int, size: int, silence_s: float) -> None:
        self.who = f"rank {rank} (pid {os.getpid()} on {socket.gethostname()})"
        self.silence_s, self.token = silence_s, ""
        self.store: Any = None
        """The launcher's; rank 0 may be its host."""
        self.links: list[Link] = []
        self.awaited = set(range(1, size)) if rank == 0 else set()
        self.began = self.looked = self.spoke = time.monotonic()
        self.leaving = False
        """Whether this process ends by itself, whatever happens to others."""
        self.lock = threading.RLock()
        self.selector = selectors.DefaultSelector()

    def listen(self) -> str:
        """Take connections, as rank 0; what the others need for them."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self.selector.register(listener, selectors.EVENT_READ)
        self.token = secrets.token_hex()
        return json.dumps([listener.getsockname()[1], self.token])

    def connect(self, host: str, told: str) -> None:
        """Connect to rank 0."""
        port, self.token = json.loads(told)
        link = self._add(socket.create_connection((host, port), timeout=JOIN_S))
        link.who = f"rank 0 (on {host})"
        link.send({"token": self.token, "who": self.who})

    def _add(self, connection: socket.socket) -> Link:
        connection.settimeout(BEAT_S)
        link = Link(connection)
        self.links.append(link)
        self.selector.register(connection, selectors.EVENT_READ, link)
        return link

    def run(self) -> None:
        """Look, listen and speak for as long as the process lives; on a thread of its own."""
        while True:
            for key, _ in self.selector.select(BEAT_S / 4):
                if key.data is None:
                    self._add(key.fileobj.accept()[0])  # type: ignore[union-attr]
                else:
                    self._read(key.data)
            if time.monotonic() - self.spoke > BEAT_S:
                self.spoke = time.monotonic()
                self._tell({})
            self._notice_silence()

    def _read(self, link: Link) -> None:
        for message in link.messages():
            if not link.who and message.get("token") != self.token:
                return self._drop(link)  # a stranger's
            if "who" in message:
                link.who = message["who"]
                self.awaited.discard(int(link.who.split()[1]))
            elif "failed" in message:
                self._end(message["failed"])
            elif "bye" in message:
                return self._drop(link)
            elif "gone" in message:
                self._drop(link)
                self._end(f"{link.who} ended without a word: was it killed, or out of memory?")
        return None

    def _drop(self, link: Link) -> None:
        self.selector.unregister(link.socket)
        self.links.remove(link)
        link.socket.close()

    def _notice_silence(self) -> None:
        now = time.monotonic()
        if now - self.looked > self.silence_s / 2:  # this process stood still, perhaps all did
            for link in self.links:
                link.heard = now
        self.looked = now
        for link in self.links:
            if now - link.heard > self.silence_s:
                self._end(
                    f"{link.who} has not been heard for {self.silence_s:.0f} s: it hangs, or its "
                    "machine or the network is gone"
                )
        if self.awaited and now - self.began > JOIN_S:
            ranks = ", ".join(map(str, sorted(self.awaited)))
            self._end(f"rank {ranks} did not come within {JOIN_S:.0f} s")

    def _tell(self, message: Mapping[str, Any]) -> None:
        with self.lock:
            for link in list(self.links):
                if link.who:
                    link.send(message)

    def _end(self, what: str) -> None:
        """Hand on what happened and end: the main thread may wait for ever, and hold any lock."""
        with self.lock:
            if self.leaving:
                return
            self._tell({"failed": what})
            text = f"\nerror: {what}\n{self.who} ends as well; the same command goes on\n"
            os.write(2, text.encode())
            os._exit(1)

    def leave(self) -> None:
        """The work is done everywhere."""
        with self.lock:
            self.leaving = True
            self._tell({"bye": True})

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends; it prints the error itself."""
        with self.lock:
            self.leaving = True
        for _ in range(100):  # who comes a moment later must hear it, too
            if not self.awaited:
                break
            time.sleep(GRACE_S / 100)
        self._tell({"failed": f"{self.who} failed: {type(error).__name__}: {error}"})


def join(silence_s: float) -> Watch:
    """Find the processes that the launcher started, and begin to watch.

    Raises:
        JoinError: They do not come, or rank 0 cannot be reached.
    """
    from torch.distributed.rendezvous import rendezvous

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, watch = os.environ["MASTER_ADDR"], Watch(rank, size, silence_s)
    try:
        store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
        if rank == 0:
            store.set(KEY, watch.listen())
        else:
            watch.connect(host, store.get(KEY).decode())
    except (OSError, RuntimeError) as error:
        raise JoinError(
            f"{watch.who} and the others did not meet at MASTER_ADDR={host} "
            f"MASTER_PORT={os.environ['MASTER_PORT']} within {JOIN_S:.0f} s ({error}). See "
            "what the others say; if they wait as well, the address is wrong, or the port closed"
        ) from error
    watch.store = store
    threading.Thread(target=watch.run, name="watch", daemon=True).start()
    return watch


@contextmanager
def watched(silence_s: float) -> Iterator[None]:
    """Watch the other processes, if there are any, while the block runs."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    watch = join(silence_s)
    try:
        yield
    except RuntimeError as error:
        time.sleep(GRACE_S)  # when another's end is the cause, the watch ends this process now
        watch.fail(error)
        raise
    except BaseException as error:
        watch.fail(error)
        raise
    watch.leave()
