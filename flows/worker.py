"""Prefect's worker, made to outlast its server.

    python -m flows.worker start --pool gpu-single --type process          options as of `prefect worker start`

A training of days needs no server, but Prefect's own worker (3.8.8) gives up on one that is away: after three polls in
vain, half a minute, nobody watches its runs for a cancellation any more, nor ever after a server that said goodbye, and
the UI shows as Cancelled what goes on; after twelve the worker ends, and its guard ends its trainings.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
from prefect._internal import observers
from prefect.cli import app as prefect
from prefect.events import Event
from prefect.events.clients import PrefectEventSubscriber, get_events_subscriber
from prefect.logging import get_logger
from prefect.utilities.services import critical_service_loop
from prefect.workers import base

GREETINGS = 1000  # in vain, a second each
GAVE_UP = "Service exceeded error threshold."  # all that Prefect's loop says of it


def main() -> None:
    """Prefect's own command with patient connections."""
    for module in (base, observers):
        vars(module)["critical_service_loop"] = unending_loop
    vars(observers)["get_events_subscriber"] = patient_subscriber
    sys.argv = ["prefect", "--no-prompt", "worker", *sys.argv[1:]]
    prefect()


async def unending_loop(workload: Callable[..., Coroutine[Any, Any, Any]], interval: float, **options: Any) -> None:
    """Prefect's loop that asks the server something every `interval` seconds, begun again where it gives up.

    What the server refuses (a wrong password, a pool that is gone) still ends it.
    """
    last: deque[str] = deque(maxlen=1)  # of the lines, tracebacks among them, that Prefect's would print

    def note(*printed: object) -> None:
        last.extend(line.strip() for text in printed for line in str(text).splitlines() if line.strip())

    while True:
        try:
            return await critical_service_loop(workload, interval, **({"printer": note} | options))
        except RuntimeError as error:
            if str(error) != GAVE_UP:
                raise
        get_logger("worker").warning("The server does not answer; runs go on, and it is asked again: %s", *last)
        await anyio.sleep(interval)


@asynccontextmanager
async def patient_subscriber(**options: Any) -> AsyncIterator[AsyncIterator[Event]]:
    """Prefect's stream of events, connected again every second for as long as it takes; it sends what was missed."""
    async with get_events_subscriber(**options, reconnect_on_clean_close=True) as subscriber:
        # Not from the start: where events never come through, Prefect asks for cancelled runs instead.
        subscriber._reconnection_attempts = sys.maxsize
        yield _events(subscriber)


async def _events(subscriber: PrefectEventSubscriber) -> AsyncIterator[Event]:
    """Its events, also behind what it takes for final: a server that dies or is not ready while it is greeted."""
    for _ in range(GREETINGS):
        try:
            async for event in subscriber:
                yield event
        except Exception:  # it says which of many libraries' in words only; behind the last one Prefect asks instead
            subscriber._websocket = None
        await anyio.sleep(1)
    raise RuntimeError("the server's events do not come through")


if __name__ == "__main__":
    main()
