"""Everything for scheduled runs on this machine: database, server, pools, deployments, automations, workers.

    python -m flows.serve                       on loopback, port 4200      (make serve)
    python -m flows.serve --database sqlite     without PostgreSQL: for a look only

PostgreSQL is used where it is installed: SQLite under workers was seen to lock and to lose a cancellation. Ctrl-C, or
SIGTERM, stops all of it in order; a run in progress saves a checkpoint first. What dies is started again.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from flows import postgres
from flows.files import FILES_URL, LOOPBACK
from flows.pools import POOL_LIMITS, pools, pools_of_this_machine
from flows.services import POLL_SECONDS, Service, first_start, revive, seconds_to_stop, stop_all
from tasks.errors import EXIT_USER_ERROR, UserError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ANY_ADDRESS = "0.0.0.0"
DATABASE = "PREFECT_API_DATABASE_CONNECTION_URL"
UI_API = ("PREFECT_SERVER_UI_API_URL", "PREFECT_UI_API_URL")  # new name, old name
# Prefect's own answer is `*`: any page that the user visits could read and start what the server holds.
ORIGINS = ("PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS")  # new name, old name
# The first start migrates an empty database: 40 s on two busy cores.
SECONDS_TO_START = 180.0
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


def main(argv: list[str] | None = None) -> int:
    """Start everything, keep it alive, stop it in order; returns the exit code."""
    options = _parse(argv)
    for number in STOP_SIGNALS:  # SIGINT too: a shell starts background commands with it ignored
        signal.signal(number, _interrupt)
    services: list[Service] = []
    try:
        _start(options, services)
        while True:
            revive(services, _say)
            time.sleep(POLL_SECONDS)
    except UserError as error:
        print(f"\n{error}\n", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _say(f"stopping; a run in progress saves a checkpoint first (at most {seconds_to_stop():.0f} s)")
        return 0
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # once is enough
        stop_all(services, _say)


def _start(options: argparse.Namespace, services: list[Service]) -> None:
    _check_address(options.host, options.port)
    home = Path(os.environ["PREFECT_HOME"])
    logs = home / "logs"
    workers_are_ours = options.host in LOOPBACK and DATABASE not in os.environ  # and none of them runs yet
    database = _start_database(options.database, home, services)
    shown = socket.gethostname() if options.host == ANY_ADDRESS else options.host
    url = f"http://{shown}:{options.port}"
    _start_server(options, url, logs, services)
    files_url = os.environ.setdefault(FILES_URL, f"http://{shown}:{options.port + 1}")
    _start_files(options, logs, services)

    os.environ["PREFECT_API_URL"] = f"{url}/api"
    with first_start("the registration of the deployments"):
        registered = subprocess.run(_deploy_command(workers_are_ours), check=False)
    if registered.returncode:  # it has said why
        raise UserError("the deployments could not be registered", where="prefect.yaml")
    started = pools_of_this_machine() if options.pools is None else options.pools
    for pool in started:
        _begin(_worker(pool, logs), services)
    _say(_page(url, files_url, database, started, logs))


def _begin(service: Service, services: list[Service]) -> None:
    """Start a service for the first time, among those that are kept alive and stopped at the end."""
    services.append(service)
    with first_start(service.name):
        service.start()


def _start_database(wanted: str | None, home: Path, services: list[Service]) -> str:
    """Start PostgreSQL and name it to Prefect; a text for the page."""
    if DATABASE in os.environ:
        return f"as {DATABASE} says"
    binaries = postgres.find_binaries()
    if wanted is None and binaries is None and (stands := home / "postgres" / "PG_VERSION").exists():
        raise UserError(f"the database is of PostgreSQL {stands.read_text().strip()}, which is not installed any more",
                        where=str(stands.parent), todo="install it; or, without history and secrets, for a look: "
                        "make serve DATABASE=sqlite")  # fmt: skip
    if wanted == "sqlite" or (wanted is None and binaries is None):
        install = "" if binaries else "; install PostgreSQL (Debian: apt-get install postgresql) for more"
        return f"SQLite in {home}, for a look only: it locks under workers{install}"
    if binaries is None:
        raise UserError("PostgreSQL is not installed here: neither initdb on the path nor /usr/lib/postgresql",
                        todo="apt-get install postgresql, or: make serve DATABASE=sqlite")  # fmt: skip
    with first_start("PostgreSQL"):
        cluster = postgres.prepare_cluster(home, binaries)
    service = Service("PostgreSQL", cluster.command(), home / "logs" / "postgres.log")
    _begin(service, services)
    with first_start("pg_isready"):
        service.wait_until(cluster.ready, SECONDS_TO_START)
    os.environ[DATABASE] = cluster.url
    return f"PostgreSQL in {cluster.data}"


def _start_server(options: argparse.Namespace, url: str, logs: Path, services: list[Service]) -> None:
    # Others reach it by names that we do not know; on loopback a foreign name is a web page that was pointed there.
    server = [sys.executable, "-m", "flows.server"] if options.host in LOOPBACK else [*PREFECT, "server"]
    command = [*server, "start", "--host", options.host, "--port", str(options.port)]
    environment = {
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    if not any(name in os.environ for name in UI_API):  # who puts a proxy before us says it
        environment[UI_API[0]] = f"{url}/api"  # where the browser finds it; else port 4200, whatever ours is
    if not any(name in os.environ for name in ORIGINS):
        ours = [url, *(f"http://{name}:{options.port}" for name in LOOPBACK)]
        environment[ORIGINS[0]] = ",".join(dict.fromkeys(ours))
    service = Service("the server", command, logs / "server.log", environment)
    _say("starting the server; the first time it makes its tables, which takes up to a minute")
    _begin(service, services)
    service.wait_until(lambda: _answers(f"{url}/api/health"), SECONDS_TO_START)


def _start_files(options: argparse.Namespace, logs: Path, services: list[Service]) -> None:
    """Reports and models of `runs/` for the links in Prefect's UI, which cannot open files."""
    command = [sys.executable, "-m", "flows.files", "--host", options.host, "--port", str(options.port + 1)]
    _begin(Service("the file server", command, logs / "files.log"), services)


def _deploy_command(workers_are_ours: bool) -> list[str]:
    """Register everything; where all workers are ours, what is shown as Running cannot be: none of them runs yet."""
    return [sys.executable, "-m", "flows.deploy", *(["--mark-lost"] if workers_are_ours else [])]


def _worker(pool: str, logs: Path) -> Service:
    name = f"{socket.gethostname()}-{pool}"
    command = [sys.executable, "-m", "flows.worker", "start", "--pool", pool, "--type", "process", "--name", name]
    environment = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_LOGGING_LEVEL": "INFO"}
    return Service(f"the worker of {pool}", command, logs / f"worker-{pool}.log", environment)


def _check_address(host: str, port: int) -> None:
    if ":" in host:
        raise UserError(f"'{host}' is an IPv6 address", where="--host", allowed="an IPv4 address, or a host's name",
                        todo="make serve HOST=127.0.0.1, or HOST=0.0.0.0")  # fmt: skip
    if host not in LOOPBACK and "PREFECT_SERVER_API_AUTH_STRING" not in os.environ:
        _say(f"{host} is open to the network: whoever reaches it can start runs. "
             "Set PREFECT_SERVER_API_AUTH_STRING=user:password, and put TLS before it")  # fmt: skip
    os.environ.setdefault("PREFECT_API_AUTH_STRING", os.environ.get("PREFECT_SERVER_API_AUTH_STRING", ""))
    if not os.environ["PREFECT_API_AUTH_STRING"]:
        del os.environ["PREFECT_API_AUTH_STRING"]
    for number in (port, port + 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, number))
            except OSError as error:
                raise UserError(f"{host}:{number} cannot be used: {error.strerror}",
                                todo="stop the other `make serve`, or: make serve PORT=4300") from None  # fmt: skip


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _page(url: str, files_url: str, database: str, started: list[str], logs: Path) -> str:
    idle = [pool for pool in pools() if pool not in started]
    lines = [
        f"steep serves on {url}",
        f"  database     {database}",
        f"  workers      {', '.join(f'{p} (at most {POOL_LIMITS.get(p, 1)} at a time)' for p in started)}"
        + (f"; none here for {', '.join(idle)}" if idle else ""),
        f"  start a run  {url}/deployments, or: PREFECT_API_URL={url}/api prefect deployment run pipeline/cpu",
        f"  reports      {files_url}",
        *(
            ["  open to      every user of this machine, until PREFECT_SERVER_API_AUTH_STRING=user:password is set"]
            if "PREFECT_SERVER_API_AUTH_STRING" not in os.environ
            else []
        ),
        f"  logs         {logs}",
        "Ctrl-C ends all of it.",
    ]
    return "\n".join(lines)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flows.serve", description="serve scheduled runs on this machine")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (default: loopback)")
    parser.add_argument("--port", type=int, default=4200, help="the server's; the file server takes the next one")
    parser.add_argument("--database", choices=("postgres", "sqlite"), help="default: PostgreSQL where it is installed")
    parser.add_argument("--pools", nargs="*", help="work pools to start a worker for (default: what fits this machine)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
