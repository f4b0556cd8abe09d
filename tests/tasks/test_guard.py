"""The guard's narrow moments: a worker that ends while others are reaped, a guard that died before its worker began."""

import subprocess
import sys

from tests.conftest import ROOT

ENDS_WHILE_WE_REAP = """
import os, subprocess
from tasks import guard

class Late(subprocess.Popen):
    looked = False

    def poll(self):
        if self.looked:
            return super().poll()
        self.looked = True  # it had not ended when we looked, and ends just behind that

worker = Late(["sh", "-c", "exit 7"])
inherited = subprocess.Popen(["true"])
for one in (worker, inherited):
    os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)
assert not guard._living(worker)
print(worker.poll(), os.path.exists(f"/proc/{inherited.pid}"))
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_the_exit_code_of_a_worker_that_ends_while_others_are_reaped_is_kept() -> None:
    done = run(ENDS_WHILE_WE_REAP)
    assert (done.stdout, done.stderr) == ("7 False\n", "")


def test_a_worker_whose_guard_is_dead_does_not_begin() -> None:
    done = run("from tasks import guard; guard._tie_to_guard(4194305); print('begins')")  # no process has that number
    assert (done.returncode, done.stdout) == (143, "")


def test_a_command_that_is_not_there_is_one_line() -> None:
    done = run("import sys; from tasks import guard; sys.exit(guard.main(['--grace', '1', '--', '/no/such/program']))")
    assert done.returncode == 127
    assert done.stderr == "/no/such/program cannot be started: No such file or directory\n"
