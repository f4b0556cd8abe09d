"""What the Makefile would run, of what it was told."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.conftest import ROOT

EXPORTED = {"HOST": "login1.cluster", "PORT": "8080", "DATABASE": "sqlite"}


def commands(*arguments: str, folder: Path = ROOT, **environment: str) -> str:
    """What `make` would run; an installed environment is taken as given."""
    make = ["make", "--dry-run", *arguments]
    return subprocess.check_output(make, cwd=folder, env=os.environ | environment, text=True, timeout=60)


def test_what_a_shell_exports_does_not_open_the_server() -> None:
    [line] = [line for line in commands("serve", **EXPORTED).splitlines() if "flows.serve" in line]
    assert "--" not in line
    [line] = [line for line in commands("serve", "HOST=0.0.0.0", "PORT=4300").splitlines() if "flows.serve" in line]
    assert line.split()[-4:] == ["--host", '"0.0.0.0"', "--port", '"4300"']


def test_paths_with_a_space(tmp_path: Path) -> None:
    folder = tmp_path / "our bank"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    said = commands("plan", "CONFIG=configs/my run.yaml", folder=folder)
    assert f'PREFECT_HOME="{folder}/.prefect"' in said and '--config "configs/my run.yaml"' in said


def test_clean_leaves_results_and_the_servers_database() -> None:
    assert not {"runs", ".prefect"} & set(commands("clean").split())
