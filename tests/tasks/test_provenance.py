"""Which code computed an artifact."""

from pathlib import Path

import pytest

from tasks import provenance
from tests.conftest import ROOT


def test_an_image_without_a_repository_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEEP_COMMIT", "598ffce00000")
    if (ROOT / ".git").exists():
        assert provenance.git_commit() != "598ffce00000", "a checkout knows better"
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tasks" / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit() == "598ffce00000"
    monkeypatch.setenv("STEEP_COMMIT", "")  # of an image built without the argument
    assert provenance.git_commit() is None
