"""A worker that does as its order says, for the tests of the launcher: python -m tests.tasks.worker DIR."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tasks.errors import EXIT_OOM, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from tasks.progress import say
from tasks.stage import ERROR, LOCK_FD_VARIABLE, OOM, finish, read_order, write_json, write_text

directory = Path(sys.argv[1])
deed = read_order(directory).what["deed"]
say(f"deed {deed}")
print("a library's noise", flush=True)
if deed in ("work", "work slowly"):
    time.sleep(1.5 if deed == "work slowly" else 0)
    (directory / "rows.arrow").write_text("rows")
    finish(directory, ["rows.arrow"], {"lock": os.environ.get(LOCK_FD_VARIABLE, "")}, 0.0)
elif deed == "refuse":
    write_text(directory / ERROR, str(UserError("bad row", where="a.jsonl:7", todo="mend it")))
    sys.exit(EXIT_USER_ERROR)
elif deed == "preempted":
    sys.exit(EXIT_PREEMPTED)
elif deed == "crash":
    raise ZeroDivisionError("the reason")
elif deed.startswith("needs memory"):  # for at most N rows; a checkpoint a try shows that the directory stays
    rows, most = read_order(directory).how["microbatch_rows"], int(deed.split()[-1])
    (directory / "checkpoints").mkdir(exist_ok=True)
    (directory / "checkpoints" / f"{rows}").touch()
    if rows > most:
        record = {"measured_gib": 10.0 * rows, "predicted_gib": 12.5, "microbatch_rows": rows, "step": 3}
        write_json(directory / OOM, record)
        sys.exit(EXIT_OOM)
    (directory / "rows.arrow").write_text("rows")
    finish(directory, ["rows.arrow"], {"tries": sorted(p.name for p in directory.glob("checkpoints/*"))}, 0.0)
elif deed.startswith("needs tries"):  # so many; each but the last is stopped behind a checkpoint
    tries = len(list(directory.glob("checkpoints/*"))) + 1
    if tries < int(deed.split()[-1]):
        (directory / "checkpoints").mkdir(exist_ok=True)
        (directory / "checkpoints" / f"{tries}").touch()
        sys.exit(EXIT_PREEMPTED)
    (directory / "rows.arrow").write_text("rows")
    finish(directory, ["rows.arrow"], {"tries": tries}, 0.0)
elif deed == "hang":  # with a grandchild in the same group, which ignores SIGTERM
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", script])
    (directory / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
