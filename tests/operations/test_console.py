"""The screen: one line that moves on a terminal, plain lines elsewhere."""

import io
import logging

import pytest

from flows.console import CLEAR_LINE, Bar, draw
from tasks.progress import Progress, read


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("prefect.task_runs", logging.INFO, __file__, 1, message, (), None)


def test_what_progress_says_is_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("cpt", "step", 1200).update(300, loss="2.130", **{"": "9,812 tok/s"})
    line = capsys.readouterr().out.removeprefix("[steep] ").rstrip("\n")
    reading = read(line)
    assert reading is not None, line
    assert (reading.stage, reading.share) == ("cpt", 0.25)
    assert reading.text.startswith("step 300/1,200, loss 2.130, 9,812 tok/s, ETA 0:0")


@pytest.mark.parametrize(
    "line", ["cpt           starting", "cpt           done: loss 5.7, 445 tok/s", "report 3/4 of it"]
)
def test_other_lines_are_no_progress(line: str) -> None:
    assert read(line) is None


def test_progress_moves_one_line_and_other_lines_are_printed() -> None:
    screen = io.StringIO()
    bar = Bar(screen)
    assert bar.filter(record("cpt           step 2/8   25%  loss 5.9  ETA 0:03")) is False
    assert bar.filter(record("cpt           step 4/8   50%  loss 5.8  ETA 0:02")) is False
    assert screen.getvalue().count(CLEAR_LINE) == 2 and "\n" not in screen.getvalue()
    assert bar.filter(record("cpt           saving a checkpoint")) is True
    assert screen.getvalue().endswith(CLEAR_LINE)  # the foot is free for the line
    assert bar.filter(record("cpt           step 8/8  100%  loss 5.7  ETA 0:00")) is True


def test_the_bar_is_as_long_as_the_share() -> None:
    reading = read("cpt           step 4/8   50%  loss 5.8  ETA 0:02")
    assert reading is not None
    assert draw(reading) == "cpt           [============>           ]  50%  step 4/8, loss 5.8, ETA 0:02"
