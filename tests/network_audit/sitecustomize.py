"""Put on PYTHONPATH, this notes every attempt of a Python process to reach beyond loopback into $STEEP_NETWORK_AUDIT."""

import os
import sys

LOOPBACK = ("127.", "localhost", "::1", "0.0.0.0", "None", "b'127.")


def note(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook: a line for each name that is looked up and each address that is connected to."""
    if event not in ("socket.connect", "socket.getaddrinfo") or "STEEP_NETWORK_AUDIT" not in os.environ:
        return  # a hook stays for the life of a process; the variable may be gone
    target = arguments[1] if event == "socket.connect" else arguments[0]
    host = target[0] if isinstance(target, tuple) else target
    if isinstance(host, (str, bytes, type(None))) and not str(host).startswith((*LOOPBACK, "/", "b'/")):
        with open(os.environ["STEEP_NETWORK_AUDIT"], "a") as file:  # noqa: PTH123  # as early and as bare as can be
            file.write(f"{event} {target!r} by {' '.join(sys.orig_argv)[:200]}\n")


if "STEEP_NETWORK_AUDIT" in os.environ:
    sys.addaudithook(note)
