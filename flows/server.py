"""Prefect's server for `make serve` on loopback: it answers who names loopback as `Host`, and hardly anybody else.

    python -m flows.server start --host 127.0.0.1 --port 4200          options as of `prefect server start`

The one other name is that of PREFECT_SERVER_UI_API_URL, under which browsers find it behind a proxy.

A web page whose own name was pointed at 127.0.0.1 after it was loaded is of the same origin as the server then, so no
rule on origins holds it back: it could start runs, and change the command that a worker starts.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from prefect.cli import app as prefect
from prefect.settings import PREFECT_UI_API_URL
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flows.files import names_on_loopback


def main() -> None:
    """Prefect's own command, with our guard around the application that it serves.

    Around what uvicorn is given, not within `create_app`: the server's automations call the same application in memory,
    by a name of their own.
    """
    run = uvicorn.run

    def run_guarded(app: Any, *arguments: Any, **options: Any) -> None:
        assert not isinstance(app, str), "several server processes would each import the application without the guard"
        names = names_on_loopback(PREFECT_UI_API_URL.value())
        guarded = TrustedHostMiddleware(app, allowed_hosts=names, www_redirect=False)
        run(guarded, *arguments, **options)

    uvicorn.run = run_guarded
    sys.argv = ["prefect", "--no-prompt", "server", *sys.argv[1:]]
    prefect()


if __name__ == "__main__":
    main()
