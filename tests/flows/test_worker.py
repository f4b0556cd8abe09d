"""A worker outlasts its server: neither its polls nor its watch for cancelled runs give up."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import anyio
import httpx
import pytest
from prefect.utilities.services import critical_service_loop

from flows import worker

POLLS_IN_VAIN = 40


class Done(Exception):
    """The end of a loop that has none."""


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    taken: list[float] = []

    async def nap(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr(anyio, "sleep", nap)
    yield taken


def server_away(error: Exception) -> tuple[list[int], object]:
    """A poll that fails so many times, then is answered, then ends the loop."""
    polls: list[int] = []

    async def poll() -> None:
        polls.append(1)
        if len(polls) <= POLLS_IN_VAIN:
            raise error
        if len(polls) > POLLS_IN_VAIN + 1:
            raise Done

    return polls, poll


REQUEST = httpx.Request("POST", "http://127.0.0.1:4200/api")
AWAY = {
    "refused": httpx.ConnectError("refused", request=REQUEST),
    "its database is away": httpx.HTTPStatusError("500", request=REQUEST, response=httpx.Response(500)),
}


@pytest.mark.parametrize("backoff", [1, 4])  # of a run's watch for cancellations, and of the worker's polls
@pytest.mark.parametrize("kind", AWAY)
def test_polls_go_on_until_the_server_is_back(
    naps: list[float], kind: str, backoff: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *words: warnings.append(text % words))
    monkeypatch.setattr(worker, "get_logger", lambda name: logger)
    polls, poll = server_away(AWAY[kind])
    with pytest.raises(Done):
        anyio.run(lambda: worker.unending_loop(poll, 10, jitter_range=0.3, backoff=backoff))
    assert len(polls) == POLLS_IN_VAIN + 2
    assert len(warnings) == POLLS_IN_VAIN // (3 * backoff) and all(str(AWAY[kind]) in one for one in warnings)
    assert max(naps) < 10 * 2**backoff  # the pauses begin anew: it notices soon that the server is back

    polls, poll = server_away(AWAY[kind])
    with pytest.raises(RuntimeError, match=worker.GAVE_UP):  # else we need not mend it
        anyio.run(lambda: critical_service_loop(poll, 10, backoff=backoff, printer=lambda *_: None))
    assert len(polls) == 3 * backoff


def test_what_the_server_refuses_ends_the_loop(naps: list[float]) -> None:
    refused = httpx.HTTPStatusError("401", request=REQUEST, response=httpx.Response(401))
    polls, poll = server_away(refused)
    with pytest.raises(httpx.HTTPStatusError):
        anyio.run(lambda: worker.unending_loop(poll, 10))
    assert len(polls) == 1


class Greeted:
    """A stream of events whose connection breaks twice while it is greeted, then brings one."""

    def __init__(self) -> None:
        self._websocket: object = object()
        self.broken: list[object] = []

    def __aiter__(self) -> Greeted:
        return self

    async def __anext__(self) -> str:
        self.broken.append(self._websocket)
        if len(self.broken) < 3:
            raise Exception("Unable to authenticate to the event stream")  # as Prefect's own says it
        return "Cancelling"


def test_events_come_also_behind_a_server_that_died_while_it_was_greeted(naps: list[float]) -> None:
    stream = Greeted()

    async def first() -> str:
        return await anext(worker._events(stream))

    assert anyio.run(first) == "Cancelling"
    assert len(stream.broken) == 3 and stream.broken[-1] is None  # it connects anew, not on the broken one
