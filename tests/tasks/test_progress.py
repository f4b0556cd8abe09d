"""Lines of progress: all of them move the bar, fewer are kept as hours pass."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks import artifacts, outcome, progress
from tasks.plan import Planned
from tasks.stage import Order

HOUR_SECONDS = 3600


def line(step: int, steps: int) -> str:
    return f"cpt           step {step:,}/{steps:,}  {step / steps:4.0%}  loss 2.1  9,812 tok/s  ETA 0:45"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_day_of_progress_is_some_hundred_rows_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    said: list[tuple[float, str, bool]] = []
    now, steps = [0.0], 24 * HOUR_SECONDS // 2
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(artifacts, "speaker", lambda: lambda line, kept=True: said.append((now[0], line, kept)))
    monkeypatch.setattr(artifacts, "_run_ids", lambda: {"flow_run_id": "here"})
    monkeypatch.setattr(artifacts._Poster, "run", lambda self: None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    planned = Planned(Order("cpt", "train", "tiny", {}, {}, {}), tmp_path, ())
    with artifacts.live([planned]) as say:
        for step in range(1, steps + 1):  # one every 2 s
            now[0] += 2.0
            say(line(step, steps))
            if step % 600 == 0:
                say(f"cpt           saving a checkpoint at step {step}")
    kept_at = [at for at, _, kept in said if kept]
    assert len([at for at in kept_at if at <= 120]) == 60
    assert 1440 < len(kept_at) < 1800
    assert sum("saving" in text for _, text, kept in said if kept) == steps // 600, "other lines are all kept"
    assert max(after - before for before, after in pairwise(kept_at)) <= 62
    assert said[-2][1:] == (line(steps, steps), True)
    assert len(said) == (steps + steps // 600 if terminal else len(kept_at)), "a terminal's bar gets all of them"


def test_what_is_not_kept_is_not_sent_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[object] = []
    logger = SimpleNamespace(info=lambda text, line, extra: logged.append((line, extra)))
    monkeypatch.setattr(outcome, "get_run_logger", lambda: logger)
    outcome.speaker()("moves", kept=False)
    outcome.speaker()("stays")
    assert logged == [("moves", {"send_to_api": False}), ("stays", {"send_to_api": True})]
