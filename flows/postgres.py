"""A PostgreSQL server of the project's own, for `make serve`: under .prefect/postgres, on a unix socket only.

PostgreSQL refuses to run as root. Then it runs as the user that its package made, and where that user cannot reach the
project (one below /root, say) the cluster lies in that user's home instead. No TCP port, no password: the socket's
folder is open to its owner alone.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import UserError

PACKAGE_USERS = ("postgres", "nobody")  # who runs it when we are root
DEBIAN = Path("/usr/lib/postgresql")  # a folder a major version


@dataclass(frozen=True)
class Cluster:
    """Where the data and the socket lie, who runs it, and which binaries do."""

    data: Path
    socket: Path
    binaries: Path
    user: str | None  # None: ourselves

    @property
    def url(self) -> str:
        """What Prefect connects to."""
        return f"postgresql+asyncpg://steep@/postgres?host={self.socket}"

    def command(self) -> list[str]:
        """Run the server in the foreground."""
        server = [str(self.binaries / "postgres"), "-D", str(self.data), "-k", str(self.socket),
                  "-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"]  # fmt: skip
        return as_user(self.user, server, _ending_with_the_guard())

    def ready(self) -> bool:
        """Whether it answers."""
        asked = [str(self.binaries / "pg_isready"), "-q", "-h", str(self.socket), "-U", "steep", "-d", "postgres"]
        return subprocess.run(as_user(self.user, asked), check=False, capture_output=True).returncode == 0


def find_binaries() -> Path | None:
    """The folder with initdb and postgres: on the path, or the newest of Debian's."""
    return next(iter(_installed()), None)


def _installed() -> list[Path]:
    folders = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    folders += sorted(DEBIAN.glob("*/bin"), key=lambda p: p.parent.name.zfill(4), reverse=True)
    return [folder for folder in folders if (folder / "postgres").exists()]


def prepare_cluster(home: Path, binaries: Path) -> Cluster:
    """The project's cluster, made by these binaries the first time; one that stands is run by those of its version."""
    user = _package_user() if os.geteuid() == 0 else None
    data = _data_folder(home, user)
    socket = Path(tempfile.mkdtemp(prefix="steep-postgres-"))  # short: a socket's path may hold 107 bytes
    atexit.register(shutil.rmtree, socket, ignore_errors=True)
    if user:
        shutil.chown(socket, user)
    stands = (data / "PG_VERSION").exists()
    cluster = Cluster(data, socket, _binaries_of(data) if stands else binaries, user)
    if not stands:
        _initialise(cluster)
    forget_dead_server(data)
    return cluster


def _binaries_of(data: Path) -> Path:
    """Those of the major version that made the data: no other can read it, and a newer one may have come since."""
    wanted = (data / "PG_VERSION").read_text().strip()
    found = {folder: _major_version(folder) for folder in _installed()}
    if matching := [folder for folder, version in found.items() if version == wanted]:
        return matching[0]
    installed = " and ".join(dict.fromkeys(version for version in found.values() if version)) or "none that runs"
    raise UserError(
        f"the database is of PostgreSQL {wanted}, and installed here is {installed}",
        where=str(data),
        todo=f"install PostgreSQL {wanted} too (Debian: postgresql-{wanted}), to go on with it or for pg_upgrade; "
        "or name another database in PREFECT_API_DATABASE_CONNECTION_URL",
    )


def _major_version(binaries: Path) -> str:
    """As PG_VERSION says it, `15`; nothing of programs that do not run."""
    try:
        asked = subprocess.run([str(binaries / "postgres"), "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    found = re.search(r"\) (\d+)", asked.stdout)  # postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)
    return found[1] if found else ""


def forget_dead_server(data: Path) -> None:
    """Remove the lock of a server that was killed with its machine, where its number now means another process.

    PostgreSQL asks only whether some process has that number; after a restart one may, the system's own PostgreSQL for
    example, and a killed server whose parent was killed too stays a zombie where nobody reaps. A living server of this
    folder keeps its lock.
    """
    lock = data / "postmaster.pid"
    try:
        process = Path(f"/proc/{int(lock.read_text().splitlines()[0])}")
        program, *arguments = (process / "cmdline").read_text(errors="replace").split("\0")  # a zombie has none
    except (OSError, ValueError, IndexError):  # nobody has the number: PostgreSQL sees that itself
        return
    if Path(program).name != "postgres" or not (str(data) in arguments or _works_in(process, data)):
        lock.unlink()


def _works_in(process: Path, folder: Path) -> bool:
    """Whether that is its working directory, as it is of every PostgreSQL; not all may see it of another user's."""
    try:
        return (process / "cwd").readlink() == folder.resolve()
    except OSError:
        return False


def as_user(user: str | None, command: list[str], options: Sequence[str] = ()) -> list[str]:
    """The command, run by that user (None: by us), with more options of setpriv's."""
    identity = ["--reuid", user, "--regid", user, "--init-groups"] if user else []
    return ["setpriv", *identity, *options, *command] if identity or options else command


@functools.cache
def _ending_with_the_guard() -> tuple[str, ...]:
    """Options of setpriv's for a server that ends when its guard is killed; none where setpriv does not know them.

    The guard has asked the kernel for that (tasks/guard.py), but a change of the user takes it back, and its signal is
    SIGTERM, at which PostgreSQL waits for its clients to leave while it lets no new one in. At SIGINT it ends at once,
    in order, and `make serve` starts it again.
    """
    try:
        known = subprocess.run(["setpriv", "--help"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ()
    return ("--pdeathsig", "INT") if "--pdeathsig" in known else ()


def _package_user() -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(user for user in PACKAGE_USERS if user in known)


def _data_folder(home: Path, user: str | None) -> Path:
    data = home / "postgres"
    if user:
        data.mkdir(parents=True, exist_ok=True)
        shutil.chown(data, user)
        if subprocess.run(as_user(user, ["test", "-w", str(data)]), check=False).returncode:
            data.rmdir()
            name = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:10]
            data = Path(pwd.getpwnam(user).pw_dir) / f"steep-{name}"
    return data


def _initialise(cluster: Cluster) -> None:
    made = [str(cluster.binaries / "initdb"), "-D", str(cluster.data), "-U", "steep", "-E", "UTF8",
            "--locale=C", "--auth=trust"]  # fmt: skip
    cluster.data.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(as_user(cluster.user, made), capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise UserError(f"PostgreSQL could not make its cluster in {cluster.data}:\n{said}",
                        todo="mend that, or run on SQLite for a look: make serve DATABASE=sqlite")  # fmt: skip
