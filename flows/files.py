"""Shows `runs/` to the browser that shows Prefect's UI: reports, tables, logs, models. Read-only.

    python -m flows.files --host 127.0.0.1 --port 4201

Reports hold text from the data. Scripts and foreign addresses are forbidden by a header, so that nothing in them acts;
dot files, and links that lead out of `runs/`, are not served. PREFECT_SERVER_API_AUTH_STRING=user:password holds here
as for Prefect's server. On loopback a request must name loopback, or the host of STEEP_FILES_URL: a web page whose own
name was pointed at 127.0.0.1 after it was loaded could read the answers otherwise.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hmac
import http.server
import os
import sys
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost")
CREDENTIALS = "PREFECT_SERVER_API_AUTH_STRING"
FILES_URL = "STEEP_FILES_URL"  # under which browsers find this server
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: 'self'; sandbox"
AS_TEXT = (".log", ".md", ".yaml", ".jsonl", ".json", ".csv", ".jinja")


class Handler(http.server.SimpleHTTPRequestHandler):
    """GET and HEAD below one folder, for those who know the credentials where there are some."""

    def __init__(self, *arguments: Any, credentials: str = "", names: Sequence[str] = LOOPBACK, **options: Any) -> None:
        self.credentials, self.names = credentials, names  # first: the base class answers within its own __init__
        super().__init__(*arguments, **options)

    def send_head(self):  # type: ignore[no-untyped-def]  # as the base class has it
        """Refuse strangers, and what leads out of the folder."""
        if not self._names_us():
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, explain=f"this server is {' or '.join(self.names)}")
            return None
        if not self._may_read():
            self.send_error(HTTPStatus.UNAUTHORIZED)
            return None
        root = Path(self.directory).resolve()
        path = Path(self.translate_path(self.path))
        if not path.resolve().is_relative_to(root) or any(
            part.startswith(".") for part in path.relative_to(root).parts
        ):
            self.send_error(404)
            return None
        return super().send_head()

    def _names_us(self) -> bool:
        assert isinstance(self.server, http.server.HTTPServer)
        named = self.headers.get("Host", "").partition(":")[0].lower()
        return self.server.server_address[0] not in LOOPBACK or named in self.names

    def _may_read(self) -> bool:
        wanted = "Basic " + base64.b64encode(self.credentials.encode()).decode()
        given = self.headers.get("Authorization", "")
        return not self.credentials or hmac.compare_digest(given.encode(), wanted.encode())

    def send_response(self, code: int, message: str | None = None) -> None:
        """A browser asks the user for the credentials when the answer says of which kind they are."""
        super().send_response(code, message)
        if code == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="steep", charset="UTF-8"')

    def end_headers(self) -> None:
        """Every answer carries the policy."""
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def guess_type(self, path) -> str:  # type: ignore[no-untyped-def, override]  # str or PathLike
        """What one reads is shown, not saved."""
        return "text/plain; charset=utf-8" if str(path).endswith(AS_TEXT) else super().guess_type(path)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def names_on_loopback(url: str | None) -> list[str]:
    """As whom a server on loopback may be asked: loopback, and the host of the address that we were told for it."""
    told = urlsplit(url or "").hostname  # a proxy's, which may pass its own name on
    return [*LOOPBACK, *([told] if told else [])]


def main() -> int:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="flows.files", description="show runs/ to a browser")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4201)
    parser.add_argument("--folder", default="runs")
    options = parser.parse_args()
    Path(options.folder).mkdir(exist_ok=True)
    directory, credentials = str(Path(options.folder).resolve()), os.environ.get(CREDENTIALS, "")
    names = names_on_loopback(os.environ.get(FILES_URL))
    handler = functools.partial(Handler, directory=directory, credentials=credentials, names=names)
    with http.server.ThreadingHTTPServer((options.host, options.port), handler) as server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
