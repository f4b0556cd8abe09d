"""Curves go where `report_to` says; what is not installed here is skipped, and refused with a word to a user."""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import UserError
from tasks.training.trackers import INSTALL, check_tracker
from tests.training.conftest import WHAT, make_stage

OTHERS = tuple(INSTALL)
# A process of a training: what it logs between two steps, and how it ends.
PART = """
import os, socket, sys, time
from pathlib import Path
asked = []
sys.addaudithook(lambda event, args: asked.append(args) if event == "socket.getaddrinfo" else None)
from tasks.training.metrics import MetricsLog
name, directory, first, last, end = sys.argv[1:]
log = MetricsLog(Path(directory), int(first), name)
for step in range(int(first) + 1, int(last) + 1):
    log.write({"step": step, "loss": 1 / step, "lr": 1e-5, "grad_norm": None, "tokens_per_second": 9.0,
               "loss_by_source": {"docs": 2.0}})
    if step == 3:
        log.flush()  # a checkpoint
if end == "killed":
    time.sleep(1)  # Trackio writes twice a second
    os._exit(9)
log.close(weights_moved_share=0.5)
assert not asked, f"a word to the network: {asked}"
"""


def part(name: str, directory: Path, first: int, last: int, end: str, **variables: str) -> str:
    ours = {"TRACKIO_DIR": str(directory.parent / "trackio")}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-c", PART, name, str(directory), str(first), str(last), end],
        env=inherited | ours | variables, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == (9 if end == "killed" else 0), done.stderr
    return done.stdout


def of_tensorboard(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_mlflow(directory: Path) -> dict[str, list[tuple[int, float]]]:
    database = sqlite3.connect(directory.parent / "mlflow.db")
    assert database.execute("select name, status from runs").fetchall() == [(directory.name, "FINISHED")]
    assert dict(database.execute("select key, value from params").fetchall())["seq_len"] == str(WHAT["seq_len"])
    curves: dict[str, list[tuple[int, float]]] = {}
    for key, *point in database.execute("select key, step, value from metrics order by step"):
        curves.setdefault(key, []).append(tuple(point))
    return curves


def of_trackio(directory: Path) -> dict[str, list[tuple[int, float]]]:
    database = sqlite3.connect(directory.parent / "trackio" / "steep.db")
    ((run, config),) = database.execute("select run_name, config from configs").fetchall()
    assert run == directory.name and json.loads(config)["seq_len"] == WHAT["seq_len"]
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, line in database.execute("select step, metrics from metrics order by id"):
        for key, value in json.loads(line).items():
            curves.setdefault(key, []).append((step, value))
    return curves


def of_wandb(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from wandb.proto.wandb_internal_pb2 import Record

    (written,) = (directory / "wandb").glob(f"offline-run-*/run-{directory.name}.wandb")  # one: synced once
    curves: dict[str, list[tuple[int, float]]] = {}
    names = set()
    for data in level_db_log(written.read_bytes()):
        record: Any = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            names.add((record.run.display_name, "seq_len" in {item.key for item in record.run.config.update}))
        line = {item.key or item.nested_key[-1]: json.loads(item.value_json) for item in record.history.item}
        for key in line.keys() - {"_step", "_runtime", "_timestamp"}:
            curves.setdefault(key, []).append((line["_step"], line[key]))
    assert names == {(directory.name, True)}
    return curves


def level_db_log(data: bytes) -> Iterator[bytes]:
    """Records of a log: blocks of 32 KiB, in them parts with a checksum (4), a length (2) and a kind (1); a head of 7."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:  # no head fits: the block is padded
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


READ: dict[str, Callable[[Path], dict[str, list[tuple[int, float]]]]] = {
    "tensorboard": of_tensorboard, "mlflow": of_mlflow, "trackio": of_trackio, "wandb": of_wandb}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_training_that_was_killed_and_resumed_leaves_each_step_once(tmp_path: Path, name: str) -> None:
    if not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed here")
    directory = make_stage(tmp_path / "runs", tmp_path, tmp_path)
    part(name, directory, 0, 5, "killed")
    part(name, directory, 3, 7, "closed")  # from a checkpoint behind the last step
    curves = READ[name](directory)
    assert curves["loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 8)]
    assert [step for step, _ in curves["loss_by_source/docs"]] == list(range(1, 8))
    assert curves["weights_moved_share"] == [(7, 0.5)] and "grad_norm" not in curves


def test_an_mlflow_server_that_is_away_costs_seconds_and_tells_no_password(tmp_path: Path) -> None:
    if not importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is not installed here")
    directory = make_stage(tmp_path / "runs", tmp_path, tmp_path)
    started_at = time.monotonic()
    said = part("mlflow", directory, 0, 3, "killed", MLFLOW_TRACKING_URI="http://me:canary@127.0.0.1:9")
    assert time.monotonic() - started_at < 60
    assert said.count("warning: mlflow does not take the curves") == 1 and "canary" not in said
    part("mlflow", directory, 3, 4, "closed")
    assert [step for step, _ in of_mlflow(directory)["loss"]] == [1, 2, 3, 4], "what it missed is told later"


@pytest.mark.parametrize("user", ["me:canary@", "canary@"])
def test_an_address_of_wandb_with_a_password_is_refused_and_not_told(
    monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{user}127.0.0.1:9")
    with pytest.raises(UserError, match="WANDB_BASE_URL holds a user or a password") as refused:
        check_tracker("wandb")
    assert "canary" not in refused.value.render()
    check_tracker("tensorboard")


def test_a_missing_package_is_told_with_what_to_install() -> None:
    missing = [name for name in OTHERS if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all of them are installed here")
    with pytest.raises(UserError, match=f"pip install {INSTALL[missing[0]]}"):
        check_tracker(missing[0])
