"""What a disk refuses is told as that, whatever the libraries between make of it."""

import errno
from pathlib import Path

import pytest

from tasks.disk import writes_told
from tasks.errors import UserError


def test_a_full_disk_behind_an_error_of_ours_is_told(tmp_path: Path) -> None:
    """datasets makes its cache while lm-eval reads a task: whatever goes wrong there is taken for a bad task."""
    with pytest.raises(UserError, match="the disk is full"), writes_told(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise UserError("the evaluation task 'x' does not load") from None


def test_bad_input_stays_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"), writes_told(tmp_path):
        try:
            (tmp_path / "gone").read_text()
        except OSError:
            raise UserError("no such file: gone") from None
