"""A served project with a training that can be hurt: `make serve`, its runs, and the census of its processes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import laws, write_lines
from tests.faults.world import MARK, World, num_steps
from tests.operations.conftest import FINAL, Served, forget, make_project, serve, wait_for

SECONDS_TO_CANCEL, SECONDS_TO_CRASHED = 15.0, 180.0
OF_A_RUN = ("-m tasks.", "guard.py", "prefect.engine", "flow-run execute", "flow_engine")


@dataclass
class House:
    """A served project, and the census of its processes."""

    project: Path
    world: World
    served: Served
    steps: int

    def serve(self) -> None:
        """Start `make serve`, also again."""
        output = self.project / f"serve-{time.monotonic_ns()}.out"  # a new one: it is read for the sign that all stands
        process, url = serve(self.project, output)
        self.served = Served(self.project, url, process, output)

    # --- runs -------------------------------------------------------------------------------------------------------

    def begin(self, name: str, seed: int, moment: random.Random, **how: Any) -> tuple[str, Path]:
        """A run up to CPT of a config of its own, some steps into its training; its id and the training's directory."""
        before = set(self.project.glob("runs/cpt-*"))
        run_id = self.served.start_run(**how, config=self.config(name, seed), until="cpt")
        wait_for(lambda: set(self.project.glob("runs/cpt-*")) - before, 240)
        [directory] = set(self.project.glob("runs/cpt-*")) - before
        wanted = moment.randint(60, self.steps // 3)
        wait_for(lambda: num_steps(directory) >= wanted or self.has_ended(run_id), 240)
        assert num_steps(directory) >= wanted, self.message(run_id)
        return run_id, directory

    def config(self, name: str, seed: int) -> str:
        """Write a config of its own, which shares no training with the others; its path in the project."""
        text = (self.project / "configs/regulator.yaml").read_text()
        (self.project / f"configs/{name}.yaml").write_text(text.replace("seed: 0", f"seed: {seed}"))
        return f"configs/{name}.yaml"

    def complete(self, name: str, **how: Any) -> str:
        """The next run of the same config completes; its id."""
        run_id = self.served.start_run(**({"until": "cpt"} | how), config=f"configs/{name}.yaml")
        run = self.served.wait_for_run(run_id)
        assert run["state_name"] == "Completed", run["state"]["message"]
        return run_id

    def cancel(self, run_id: str) -> None:
        """As the UI's button does."""
        self.served.api(f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def state(self, run_id: str) -> str:
        """The name that the UI shows."""
        return str(self.served.api(f"/flow_runs/{run_id}")["state_name"])

    def state_type(self, run_id: str) -> str:
        """The kind behind the name."""
        return str(self.served.api(f"/flow_runs/{run_id}")["state_type"])

    def message(self, run_id: str) -> str:
        """What the state says."""
        return str(self.served.api(f"/flow_runs/{run_id}")["state"]["message"])

    def has_ended(self, run_id: str) -> bool:
        """Whether the server answers and says so; one that ends takes connections for a while, then refuses them."""
        try:
            return self.state_type(run_id) in FINAL
        except httpx.TransportError:
            return False

    # --- processes --------------------------------------------------------------------------------------------------

    def of_a_run(self) -> dict[int, str]:
        """Processes of flow runs and of what they started; services are none of them."""
        return {pid: line for pid, line in self.world.processes().items()
                if any(part in line for part in OF_A_RUN) and "--grace 27" not in line}  # fmt: skip

    def kill(self, which: Callable[[str], bool], number: signal.Signals = signal.SIGKILL) -> None:
        """Send it to every process of the house whose command line is meant, at once."""
        pids = [pid for pid, line in self.world.processes().items() if which(line)]
        assert pids, "\n".join(self.world.processes().values())
        for pid in pids:
            os.kill(pid, number)


@contextmanager
def served_house(base: Path, steps: int = 1024, batch_tokens: int = 64, tags: str = "") -> Iterator[House]:
    """A project with a training of so many steps, served; `tags` are rows for its configs/hardware.yaml."""
    project = make_project(base)
    write_lines(project / "laws.jsonl", laws(6000))
    write_lines(project / "general.jsonl", [{"text": f"The river of town {n} is {n * 3} miles."} for n in range(4000)])
    with (project / "configs/hardware.yaml").open("a") as rows:
        rows.write(tags)
    config = project / "configs/regulator.yaml"
    text = config.read_text().replace("tokens: 4096", f"tokens: {steps * batch_tokens}", 1)
    often = f"  batch_tokens: {batch_tokens}\n  checkpoint: {{every_steps: 50, every_minutes: null}}"
    config.write_text(text.replace("  batch_tokens: 512", often, 1))
    world = World(project)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(MARK, world.mark)
        made = House(project, world, None, steps)  # type: ignore[arg-type]
        made.serve()
        yield made
        made.served.process.send_signal(signal.SIGINT)
        made.served.process.wait(90)
    world.wait_until_gone()
    forget(project, made.served.output)
