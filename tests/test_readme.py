"""The README's commands are run, not believed: in a copy of the project, as someone who has just cloned it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

LONG = ("make pipeline", "make test", "make benchmark", "make figures", "make base", "make sft", "--until", "--force")


def commands() -> list[str]:
    """Every command line of the README's bash blocks, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def copy_project(to: Path) -> Path:
    """What a clone would hold, with this checkout's changes; the environment is shared."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    (to / ".venv").symlink_to(ROOT / ".venv")
    return to


def run(command: str, project: Path) -> subprocess.CompletedProcess[str]:
    if command.startswith("make"):
        command = command.replace("make", "make -o .venv/.installed", 1)  # the shared environment counts as up to date
    return subprocess.run(command, shell=True, cwd=project, capture_output=True, text=True, timeout=1500, check=False)


def test_the_readme_holds_the_commands_that_we_think() -> None:
    assert commands()[:2] == ["make pipeline", "make test"]
    assert len(commands()) >= 6


def test_every_quick_command_of_the_readme_runs(tmp_path: Path) -> None:
    quick = [command for command in commands() if not any(word in command for word in LONG)]
    assert "make plan" in quick
    project = copy_project(tmp_path)
    for command in [*quick, "make help"]:
        done = run(command, project)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_long_commands_of_the_readme_run(tmp_path: Path) -> None:
    """`make pipeline` in a copy, then again: everything is reused; then the rest of the road's commands."""
    project = copy_project(tmp_path)
    first = run("make pipeline", project)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "violation_f1" in first.stdout and "report.html" in first.stdout
    again = run("make pipeline", project)
    assert again.returncode == 0 and (again.stdout + again.stderr).count("reused:") == 8, again.stderr
    for command in commands():
        if any(word in command for word in ("make sft", "--until", "--force", "HARDWARE=")):
            done = run(command, project)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_tree_of_the_readme_exists() -> None:
    named = re.findall(r"`?((?:flows|tasks|configs|data|tests)/[\w./-]*)`?", (ROOT / "README.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists()] == []
