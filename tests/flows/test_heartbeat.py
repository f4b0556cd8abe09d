"""The end of a flow does not wait for the sleep of the thread that sends its heartbeats."""

from __future__ import annotations

import logging
import threading
import time

from prefect import flow_engine

from flows.heartbeat import wake_heartbeats


class Engine:
    """As much of Prefect's engine as its heartbeats ask for; counts what is sent."""

    heartbeat_seconds, flow_run, logger = 30, None, logging.getLogger("test")

    def __init__(self) -> None:
        self.sent = threading.Semaphore(0)
        self.num_sent = 0

    def _build_heartbeat_event_template(self) -> tuple[None, None]:
        return None, None

    def _emit_flow_run_heartbeat(self, *_: object) -> None:
        self.num_sent += 1
        self.sent.release()


def test_flows_within_flows_end_at_once_and_send_no_more_than_they_should() -> None:
    wake_heartbeats()
    inner, outer, threads = Engine(), Engine(), threading.active_count()
    with flow_engine._send_heartbeats(outer):  # type: ignore[arg-type]
        assert outer.sent.acquire(timeout=10)
        with flow_engine._send_heartbeats(inner):  # type: ignore[arg-type]
            assert inner.sent.acquire(timeout=10) and threading.active_count() == threads + 2, "both are asleep now"
            began = time.monotonic()
        inner_took = time.monotonic() - began
        time.sleep(1.5)  # the outer one's thread looks up, and goes on sleeping
        began = time.monotonic()
    outer_took = time.monotonic() - began
    assert max(inner_took, outer_took) < 0.5, "Prefect alone takes up to a second"
    assert (inner.num_sent, outer.num_sent) == (1, 1)
    assert threading.active_count() == threads
