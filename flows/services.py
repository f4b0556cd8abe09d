"""Long-lived child processes of `make serve`: each under the guard, logging to its file, started again when it dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tasks.errors import UserError
from tasks.launch import GRACE_SECONDS_UNDER_PREFECT, GRACE_VARIABLE, grace_seconds

# A worker told to stop tells its run, which gives the trainer time to save (tasks/launch.py); then the run reports.
SECONDS_TO_REPORT = 15.0
POLL_SECONDS = 0.3
LONGEST_PAUSE_SECONDS = 60.0
MOST_DOUBLINGS = 6  # 2**6 s is past the longest pause; past 2**1023 a float overflows
LONG_LIFE_SECONDS = 600.0  # what lived as long and dies has not failed to start
TAIL_LINES = 12


def seconds_to_stop() -> float:
    """How long a service told to stop may take: what a run has to save a checkpoint, and then to report."""
    return (grace_seconds() if os.environ.get(GRACE_VARIABLE) else GRACE_SECONDS_UNDER_PREFECT) + SECONDS_TO_REPORT


@dataclass
class Service:
    """One process: what it runs, and how it fares."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started_at: float = 0.0  # by time.monotonic(), as the next one
    again_at: float = 0.0  # from when it may be started again

    def start(self) -> None:
        """Start it in a session of its own: Ctrl-C reaches us alone, and we stop everything in order."""
        self.started_at = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        guard = [sys.executable, "-m", "tasks.guard", "--grace", str(seconds_to_stop()), "--"]
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*guard, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | self.environment,
            )

    @property
    def runs(self) -> bool:
        """Whether it lives."""
        return self.process is not None and self.process.poll() is None

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait for it to answer. Raises `UserError` with the end of its log when it dies or takes too long."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.runs or time.monotonic() > deadline:
                ended = "did not start" if not self.runs else f"did not answer within {seconds:.0f} s"
                raise UserError(f"{self.name} {ended}; the end of its log:\n{self.tail()}", where=str(self.log))
            time.sleep(POLL_SECONDS)

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join(f"  | {line}" for line in lines)

    def stop(self) -> None:
        """SIGTERM to its guard, which ends everything below it, and wait."""
        if self.process is not None and self.runs:
            self.process.terminate()
            self.process.wait()


@contextmanager
def first_start(name: str) -> Iterator[None]:
    """What the system refuses when something is first started, as a `UserError`: there is nothing to keep alive yet."""
    try:
        yield
    except OSError as error:  # not installed, not executable, a log that cannot be written, no memory for a process
        raise UserError(f"{name} cannot be started: {error.strerror or error}", where=str(error.filename or ""),
                        todo="install it, or make it ours to run or write; `make serve` again") from None  # fmt: skip


def revive(services: list[Service], say: Callable[[str], None]) -> None:
    """Start again what has died, after a pause that doubles each time; one that lived long begins anew."""
    for service in services:
        if service.runs or time.monotonic() < service.again_at:
            continue
        if time.monotonic() - service.started_at > LONG_LIFE_SECONDS:
            service.failures = 0
        pause = min(LONGEST_PAUSE_SECONDS, 2.0 ** min(service.failures, MOST_DOUBLINGS))
        service.failures += 1
        service.again_at = time.monotonic() + pause
        code = service.process.returncode if service.process else None
        say(f"{service.name} ended (exit code {code}) and is started again; its log: {service.log}")
        try:
            service.start()
        except OSError as error:  # no memory, no space for its log: the others live on, and it is tried again
            say(f"{service.name} could not be started: {error}; the next try is in {pause:.0f} s")


def stop_all(services: list[Service], say: Callable[[str], None]) -> None:
    """Stop in reverse order: workers while the server still takes their reports, the database last."""
    for service in reversed(services):
        if service.runs:
            say(f"stopping {service.name}")
            service.stop()
