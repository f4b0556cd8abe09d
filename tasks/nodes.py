"""Several nodes: how the one that runs the pipeline meets the others, and how each notices that another is gone.

    node 0        python -m flows.pipeline ...       listens at the rendezvous while a training stage runs (`meet`)
    other nodes   python -m tasks.agent HOST:PORT    connects, is told the stage, runs its share (tasks/agent.py)

Every node runs its own torchrun on the same stage directory, which stands on a filesystem that all of them share. The
link is a TCP connection with one JSON object a line. A process that dies closes it at once; a machine that is gone is
silent. Either way the other side ends its share within a minute, and the next run resumes from the last checkpoint.

The network is trusted, as torch's own rendezvous trusts it: anybody who reaches the port can join.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.errors import UserError

RENDEZVOUS_VARIABLE = "STEEP_RENDEZVOUS"
PING_SECONDS, SILENCE_SECONDS = 5.0, 25.0  # with the guard's grace of 20 s and the kill after it: under a minute
JOIN_SECONDS = 600.0
SECONDS_TO_FOLLOW = 30.0  # when one node's share has ended, the others' end too, or something is wrong


class Link:
    """A connection to another node that notices when that node is gone."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        connection.setblocking(False)
        self.connection, self.name, self.rest = connection, name, b""
        self.lost, self.over = "", False  # why it broke; whether the stage came to its end
        self.heard_at = self.told_at = time.monotonic()

    def tell(self, **message: Any) -> None:
        """Send one message; where that fails the link is lost."""
        self.told_at = time.monotonic()
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            self._lose(f"is gone ({error})")

    def poll(self) -> list[dict[str, Any]]:
        """What came since the last call, pings left out; also pings, and notices silence."""
        received, trouble = self._receive()
        *lines, self.rest = (self.rest + received).split(b"\n")
        messages = [message for line in lines if (message := json.loads(line))]
        self.over = self.over or any("end" in message for message in messages)
        now = time.monotonic()
        if trouble or now - self.heard_at > SILENCE_SECONDS:
            self._lose(trouble or f"has been silent for {SILENCE_SECONDS:.0f} seconds")
        elif now - self.told_at >= PING_SECONDS:
            self.tell()
        return messages

    def _receive(self) -> tuple[bytes, str]:
        received = b""
        try:
            while data := self.connection.recv(65536):
                received, self.heard_at = received + data, time.monotonic()
        except BlockingIOError:
            return received, ""
        except OSError as error:
            return received, f"is gone ({error})"
        return received, "is gone (its connection was closed)"

    def _lose(self, why: str) -> None:
        if not self.over:
            self.lost = self.lost or f"{self.name} {why}"


class Company:
    """The other nodes of a stage, as node 0 sees them. `master` is where torchrun's own store will stand."""

    def __init__(self, links: list[Link], master: str) -> None:
        self.links, self.master = links, master
        self.failed_at = 0.0
        self.tail: list[str] = []  # what nodes that failed said last

    def problem(self) -> str:
        """Why this node's share should end: a node was lost, or failed a while ago. Empty while all is well."""
        for link in self.links:
            for message in link.poll():
                if message.get("exit"):
                    self.failed_at = self.failed_at or time.monotonic()
                    self.tail += [f"{link.name}: exited with {message['exit']}", *message["tail"]]
            if link.lost:
                return link.lost
        if self.failed_at and time.monotonic() - self.failed_at > SECONDS_TO_FOLLOW:
            return f"another node's share failed {SECONDS_TO_FOLLOW:.0f} seconds ago"
        return ""


@contextmanager
def meet(how: dict[str, Any], directory: Path, say: Callable[[str], None], hub: bool) -> Iterator[Company]:
    """Wait for the agents of all other nodes and tell them what to run; at the end, tell them that it is over."""
    num_others = int(how.get("nodes", 1)) - 1
    if num_others < 1:
        yield Company([], "")
        return
    host, port = read_endpoint(how.get("rendezvous"))
    with listen(host, port) as server:
        links = sorted(gather(server, num_others, f"{host}:{port}", say), key=lambda link: link.name)
    company = Company(links, master=f"{host}:{free_port(host)}")
    for rank, link in enumerate(links, start=1):
        link.tell(directory=str(directory.resolve()), node_rank=rank, master=company.master, hub=hub)
    say(f"nodes: {', '.join(['this one', *(link.name for link in links)])}")
    try:
        yield company
    finally:
        for link in links:
            link.tell(end=True)
            link.connection.close()


def gather(server: socket.socket, count: int, endpoint: str, say: Callable[[str], None]) -> list[Link]:
    """The links of `count` agents that came and said who they are."""
    links: list[Link] = []
    deadline = time.monotonic() + JOIN_SECONDS
    say(f"waiting at {endpoint} for {count} other node(s): python -m tasks.agent {endpoint}")
    while len(links) < count:
        if time.monotonic() > deadline:
            raise UserError(
                f"{len(links)} of {count} other nodes came to {endpoint} within {JOIN_SECONDS:.0f} seconds",
                todo=f"start `python -m tasks.agent {endpoint}` on each of them, or choose a tag with fewer nodes",
            )
        with suppress(OSError, ValueError, KeyError, TypeError):  # also a stranger that says something else
            connection, address = server.accept()
            connection.settimeout(PING_SECONDS)
            hello = json.loads(connection.makefile("rb", buffering=0).readline(1000))
            links.append(Link(connection, f"{hello['agent']} ({address[0]})"))
        links = [link for link in links if not (link.poll() or link.lost)]
    return links


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on this machine."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen at the rendezvous {host}:{port}: {error}", where="hardware.rendezvous",
                        allowed="an address of the node that runs the pipeline, and a free port") from None  # fmt: skip
    server.listen()
    server.settimeout(1.0)
    return server


def free_port(host: str) -> int:
    """A port for torchrun's own store, which lives on node 0."""
    with socket.socket(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def read_endpoint(said: str | None) -> tuple[str, int]:
    """Host and port of the rendezvous: the tag's, or the environment's."""
    said = said or os.environ.get(RENDEZVOUS_VARIABLE, "")
    host, _, port = said.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"several nodes need a rendezvous; got '{said}'", where="hardware.rendezvous",
                        allowed=f"host:port, in the hardware row or in {RENDEZVOUS_VARIABLE}",
                        todo=f"export {RENDEZVOUS_VARIABLE}=HOST:29400, with the host of the pipeline")  # fmt: skip
    return host, int(port)
