"""A project whose runs are hurt and started again, and a census of every process that belongs to it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tasks.config import load_config, load_hardware
from tasks.plan import Planned, make_plan
from tasks.stage import file_sha256, is_done
from tests.conftest import ROOT

MARK = "FAULTS_MARK"  # not STEEP_...: what starts a server drops those
SECONDS_FOR_A_COMMAND = 600.0
SECONDS_TO_VANISH = 30.0  # the guard's grace is 20
GROUPS = ("prepare", "cpt", "sft", "evaluate", "report")
# What a finished stage may hold; anything else was left behind.
EXPECTED = {
    "prepare": {"rows.arrow", "ledger.json", "mix.json", "examples.json", "tokenizer"},
    "train": {"model", "metrics.jsonl", "tensorboard", "resumed_from.json"},
    "evaluate": {"results.json", "samples"},
    "report": {"report.html", "report.md", "results.csv", "cpt_curves.png", "sft_curves.png"},
}
ALWAYS = {"order.json", "artifact.json", "worker.log"}


@dataclass
class World:
    """One project; `reference-TAG` holds its undisturbed stages."""

    project: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)  # (tag, group) -> undisturbed
    bytes_needed: dict[str, int] = field(default_factory=dict)  # group -> what it leaves on the disk

    @property
    def config(self) -> Path:
        """The run's file."""
        return self.project / "run.yaml"

    @property
    def runs(self) -> Path:
        """Where its stages stand."""
        return self.project / "runs"

    def plan(self, tag: str = "cpu") -> dict[str, Planned]:
        """Its stages by name."""
        return make_plan(load_config(self.config), self.config, tag, load_hardware(tag, ROOT / "configs/hardware.yaml"))

    @staticmethod
    def order(group: str) -> int:
        """Its place in the pipeline."""
        return GROUPS.index(group)

    def stages(self, group: str) -> list[Planned]:
        """Those of a group."""
        return [planned for planned in self.plan().values() if planned.group == group]

    # --- commands ---------------------------------------------------------------------------------------------------

    def environment(self, **more: str) -> dict[str, str]:
        """That of every command of ours, with the mark by which we know its processes."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "STEEP_"))}
        ours = {MARK: self.mark, "OMP_NUM_THREADS": "1", "PREFECT_HOME": str(self.project / "prefect")}
        return kept | ours | {"TMPDIR": str(self.project / "tmp")} | more

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """A command in a session of its own, as a shell would start it; its output in `said.txt`."""
        (self.project / "tmp").mkdir(exist_ok=True)
        with (self.project / "said.txt").open("wb") as said:
            return subprocess.Popen(  # no threads here
                [sys.executable, *command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                start_new_session=True, env=self.environment(**environment),
                preexec_fn=listen_to_interrupts,  # noqa: PLW1509  # we have no threads
            )  # fmt: skip

    def drive(self, group: str, tag: str = "cpu", **environment: str) -> subprocess.Popen[bytes]:
        """The stages of a group, without Prefect."""
        return self.start("-m", "tests.faults.drive", str(self.config), tag, *group.split(), **environment)

    def flow(self, group: str, tag: str = "cpu", **environment: str) -> subprocess.Popen[bytes]:
        """The same through Prefect."""
        command = ["-m", "flows.pipeline", "--config", str(self.config), "--hardware", tag, "--only", group]
        return self.start(*command, **environment)

    def said(self) -> str:
        """What the last command printed."""
        return (self.project / "said.txt").read_text(errors="replace")

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit code; nothing of it is left when it takes too long."""
        try:
            return process.wait(SECONDS_FOR_A_COMMAND)
        except subprocess.TimeoutExpired:
            self.end_all()
            raise AssertionError(f"it hung; it had said:\n{self.said()[-3000:]}") from None

    # --- processes --------------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Every living process with our mark: its command line."""
        found = {}
        mark = f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except (OSError, IndexError):
                continue
            if state not in "ZX":
                found[int(folder.name)] = line
        return found

    def find(self, *parts: str, without: tuple[str, ...] = ()) -> list[int]:
        """The processes whose command line holds all parts and none of `without`."""
        return sorted(
            pid
            for pid, line in self.processes().items()
            if all(part in line for part in parts) and not any(part in line for part in without)
        )

    def wait_until_gone(self, seconds: float = SECONDS_TO_VANISH) -> float:
        """Seconds until no process of ours lived."""
        began = time.monotonic()
        while left := self.processes():
            if time.monotonic() - began > seconds:
                self.end_all()
                raise AssertionError(f"after {seconds:.0f} s there still ran:\n" + "\n".join(left.values()))
            time.sleep(0.05)
        return time.monotonic() - began

    def end_all(self) -> None:
        """SIGKILL to all of ours."""
        while left := self.processes():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    # --- stages -----------------------------------------------------------------------------------------------------

    def need(self, group: str, tag: str) -> Path:
        """The undisturbed stages up to a group, computed when first needed, and how long each group took."""
        reference = self.project / f"reference-{tag}"
        for one in GROUPS[: GROUPS.index(group) + 1]:
            if (tag, one) in self.seconds:
                continue
            shutil.rmtree(self.runs, ignore_errors=True)
            if reference.exists():
                shutil.copytree(reference, self.runs, copy_function=shutil.copy2)
            began = time.monotonic()
            assert self.finish(self.drive(one, tag)) == 0, self.said()
            self.seconds[tag, one] = time.monotonic() - began
            shutil.rmtree(reference, ignore_errors=True)
            shutil.copytree(self.runs, reference, copy_function=shutil.copy2)
        return reference

    def rewind(self, group: str, tag: str = "cpu") -> list[Planned]:
        """As if the pipeline had come up to this group and no further; the stages of the group."""
        reference = self.need(group, tag)
        shutil.rmtree(self.runs, ignore_errors=True)
        shutil.copytree(reference, self.runs, copy_function=shutil.copy2)
        for planned in self.plan(tag).values():
            if GROUPS.index(planned.group) >= GROUPS.index(group):
                shutil.rmtree(planned.directory, ignore_errors=True)
        return self.stages(group)

    def assert_whole(self, group: str, tag: str = "cpu") -> None:
        """Every stage of the group is done, holds what the undisturbed one holds bit for bit, and nothing else."""
        for planned in self.stages(group):
            directory, reference = planned.directory, self.project / f"reference-{tag}" / planned.directory.name
            assert is_done(directory), f"{directory} is not done"
            kind = planned.order.kind
            left = {path.name for path in directory.iterdir()} - EXPECTED[kind] - ALWAYS
            assert not left, f"left behind in {planned.stage}: {sorted(left)}"
            for pattern in ("rows.arrow", "ledger.json", "model/*.safetensors", "results.json", "results.csv"):
                for file in reference.glob(pattern):
                    same = file_sha256(file) == file_sha256(directory / file.relative_to(reference))
                    assert same, f"{file.relative_to(reference)} of {planned.stage} differs from the undisturbed run's"
        stray = [path.name for path in self.runs.iterdir() if path.name.startswith(".") and path.name != ".locks"]
        assert set(stray) <= {".digests.json"}, stray


def listen_to_interrupts() -> None:
    """A session in the background ignores SIGINT, and so would all its children: nothing would be tested."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 400.0) -> bool:
    """Poll until something is true of a running command; False when it ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
    return True


def num_steps(directory: Path) -> int:
    """Those that a training has written down."""
    metrics = directory / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0
