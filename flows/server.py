"""Prefect's server for `make serve` on loopback: it answers who names loopback as `Host`, and nobody else.

    python -m flows.server start --host 127.0.0.1 --port 4200          options as of `prefect server start`

A web page whose own name was pointed at 127.0.0.1 after it was loaded is of the same origin as the server then, so no
rule on origins holds it back: it could start runs, and change the command that a worker starts.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from fastapi import FastAPI
from prefect.cli import app as prefect
from prefect.server.api import server
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flows.files import LOOPBACK


def main() -> None:
    """Prefect's own command, with our guard around the application that it serves."""
    create_app = server.create_app

    @functools.wraps(create_app)
    def create_guarded_app(*arguments: Any, **options: Any) -> FastAPI:
        app = create_app(*arguments, **options)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK), www_redirect=False)
        return app

    server.create_app = create_guarded_app
    sys.argv = ["prefect", "--no-prompt", "server", *sys.argv[1:]]
    prefect()


if __name__ == "__main__":
    main()
