"""The image's recipe, as far as it can be checked without a container engine: its steps are run or read, not believed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "flows/Dockerfile").read_text()
STEPS = [line.split(maxsplit=1) for line in re.sub(r"\\\n\s*", "", TEXT).splitlines() if line and line[0] not in "# "]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def steps(name: str) -> list[str]:
    return [rest for word, rest in STEPS if word == name]


def test_it_copies_what_exists_and_all_that_a_run_needs() -> None:
    copied = [path for step in steps("COPY") for path in step.split()[:-1]]
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert {"flows", "tasks", "configs", "data", "prefect.yaml", "constraints.txt"} <= set(copied)


@pytest.mark.parametrize("extras", ["", "unsloth", "unsloth gpu"])
def test_it_installs_what_the_project_says_at_its_pins(tmp_path: Path, extras: str) -> None:
    """The step itself, with pip replaced by something that shows what pip would be given."""
    [install] = [step for step in steps("RUN") if "pip install" in step]
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shown = f'pip() {{ echo "$@" >&2; cat needed.txt; }}\nEXTRAS="{extras}"\n{install}'
    python = shutil.which("python3.11") or shutil.which("python3")
    done = subprocess.run(
        ["sh", "-c", shown.replace("python -c", f"{python} -c")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = PROJECT["dependencies"] + [n for e in extras.split() for n in PROJECT["optional-dependencies"][e]]
    assert done.stdout.splitlines() == wanted and len(wanted) > 15
    assert "-c constraints.txt" in done.stderr


def test_every_dependency_has_a_pin() -> None:
    pins = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    named = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ;]", one)[0]).lower() for group in groups for one in group}
    assert len(named) > 25 and named - pins == set()


def test_the_commit_comes_from_the_build_as_no_repository_is_in_the_image() -> None:
    assert steps("ARG")[-1] == 'COMMIT=""' and steps("ENV")[-1] == "STEEP_COMMIT=$COMMIT"
    assert not any(".git" in path.split("/") for step in steps("COPY") for path in step.split())
    builds = re.findall(r"docker build [^`\n]*", TEXT + (ROOT / "flows/README.md").read_text())
    assert len(builds) == 3 and all("--build-arg COMMIT=$(git rev-parse HEAD)" in build for build in builds)


def test_it_is_a_tidy_image() -> None:
    assert STEPS[-2] == ["USER", "steep"]  # not root
    page = (ROOT / "flows/README.md").read_text()
    assert "`terminationGracePeriodSeconds: 150` with `STEEP_GRACE_SECONDS=120`" in page  # around the guard's time
    assert STEPS[-1] == ["ENTRYPOINT", '["python", "-m", "tasks.guard", "--grace", "135", "--"]']
    assert not re.search(r"latest|token|password|secret", TEXT, re.IGNORECASE)
    for step in steps("RUN"):
        if "apt-get install" in step:
            assert "--no-install-recommends" in step and step.endswith("rm -rf /var/lib/apt/lists/*")
        assert "pip install" not in step or "--no-cache-dir" in step
    [owned] = [step for step in steps("RUN") if "chown" in step]
    assert "runs .prefect" in owned  # all that it writes below its code
