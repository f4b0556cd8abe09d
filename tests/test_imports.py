"""The import rule: Prefect only in flows/ and tasks/*.py, torch only in the workers' packages, nothing imports both.

So the orchestrator starts fast, and a CUDA crash cannot take it down.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

WORKERS = ("preparation", "training", "evaluation", "reporting")
HEAVY = {"torch", "transformers", "trl", "accelerate", "lm_eval", "unsloth", "datasets"}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def sources(pattern: str) -> list[Path]:
    files = sorted(path for path in ROOT.glob(pattern) if not path.relative_to(ROOT).parts[0].startswith("."))
    assert files, f"no file matches {pattern}: the rule would hold over nothing"
    return files


def test_prefect_is_imported_by_flows_and_tasks_only() -> None:
    users = [path for path in sources("**/*.py") if "prefect" in imports(path)]
    assert users, "nobody imports prefect: the test looks in the wrong place"
    strays = [p for p in users if p.parent not in (ROOT / "flows", ROOT / "tasks") and "tests" not in p.parts]
    assert strays == []


@pytest.mark.parametrize("pattern", ["flows/*.py", "tasks/*.py"])
def test_the_orchestrator_imports_nothing_heavy(pattern: str) -> None:
    assert {p.name: found for p in sources(pattern) if (found := imports(p) & HEAVY)} == {}


def test_workers_do_not_import_prefect_or_its_tasks() -> None:
    prefect_tasks = {"tasks.prepare", "tasks.train", "tasks.evaluate", "tasks.report", "tasks.outcome"}
    files = [p for package in WORKERS for p in sources(f"tasks/{package}/**/*.py")]
    for path in files:
        text = path.read_text()
        assert "prefect" not in imports(path), path
        assert not [name for name in prefect_tasks if f"import {name}" in text or f"from {name} import" in text], path


def test_torch_stays_out_of_preparation_and_reporting() -> None:
    files = [p for package in ("preparation", "reporting") for p in sources(f"tasks/{package}/*.py")]
    assert {p.name for p in files if "torch" in imports(p)} == set()


def test_planning_loads_neither_torch_nor_pandas() -> None:
    code = "import sys, flows.pipeline; print(sorted({'torch', 'pandas', 'transformers', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"
