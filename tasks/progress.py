"""What a worker says while it works.

Everything a worker prints goes to `worker.log` in its stage's directory. Lines that start with `MARK` are meant for
the person who waits: the launcher forwards exactly those, so the screen stays calm while the log keeps all the noise.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass

MARK = "[steep] "
MIN_SECONDS_BETWEEN_LINES = 2.0
MAX_SECONDS_BETWEEN_KEPT_LINES = 60.0
_LINE = re.compile(r"(?P<stage>\S+) +(?P<what>\S.*?) (?P<done>[\d,]+)/(?P<total>[\d,]+)  +\d+%(?P<rest>.*)")


@dataclass(frozen=True)
class Reading:
    """A line of progress, read back: `cpt`, 0.15, `step 12/80, loss 2.13, 9,812 tok/s, ETA 0:45`."""

    stage: str
    share: float
    text: str


def read(line: str) -> Reading | None:
    """The reading of a line that `Progress` wrote; None for any other line."""
    found = _LINE.fullmatch(line)
    if not found:
        return None
    done, total = (int(found[name].replace(",", "")) for name in ("done", "total"))
    parts = [f"{found['what']} {found['done']}/{found['total']}", *found["rest"].strip().split("  ")]
    return Reading(found["stage"], done / max(1, total), ", ".join(part.strip() for part in parts if part.strip()))


def say(text: str) -> None:
    """Print one line for the person who waits."""
    print(f"{MARK}{text}", flush=True)


class Thinning:
    """Which lines of progress are kept for ever, in a database or a file: fewer the longer a stage lasts.

    All of them in the first two minutes, one in 10 s after ten minutes, one a minute from an hour on.
    """

    def __init__(self) -> None:
        self.times: dict[str, tuple[float, float]] = {}  # stage -> when it began, when a line of it was kept last

    def keeps(self, reading: Reading) -> bool:
        """Whether to keep this line; the last one of all always."""
        now = time.monotonic()
        began_at, kept_at = self.times.get(reading.stage, (now, -math.inf))
        seconds_between = min(MAX_SECONDS_BETWEEN_KEPT_LINES, (now - began_at) / 60)
        if reading.share < 1 and now - kept_at < seconds_between:
            return False
        self.times[reading.stage] = (began_at, now)
        return True


class Progress:
    """A throttled line of progress: `cpt  step 12/80  15%  loss 2.13  9,812 tok/s  ETA 0:45`."""

    def __init__(self, stage: str, what: str, total: int, first: int = 0) -> None:
        self.stage, self.what, self.total = stage, what, total
        self.first, self.started_at, self.last_line_at = first, time.monotonic(), 0.0

    def speed(self, num_tokens: int) -> str:
        """`9,812 tok/s`: tokens since the start by seconds since the start."""
        return f"{num_tokens / max(1e-3, time.monotonic() - self.started_at):,.0f} tok/s"

    def update(self, done: int, **extra: str) -> None:
        """Say how far we are, at most every `MIN_SECONDS_BETWEEN_LINES`, and always at the end."""
        now = time.monotonic()
        if done < self.total and now - self.last_line_at < MIN_SECONDS_BETWEEN_LINES:
            return
        self.last_line_at = now
        since_start = now - self.started_at
        steps_here = done - self.first  # a resumed run must not count the steps of its predecessor
        eta_seconds = since_start / steps_here * (self.total - done) if steps_here else math.nan
        eta_seconds = 0.0 if done >= self.total else eta_seconds
        parts = [f"{self.what} {done:,}/{self.total:,}", f"{done / max(1, self.total):4.0%}"]
        parts += [f"{name} {value}" if name else value for name, value in extra.items()]
        say(f"{self.stage:<14}" + "  ".join([*parts, f"ETA {clock(eta_seconds)}"]))


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    if math.isnan(seconds):  # nan: nothing measured yet
        return "-:--"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
