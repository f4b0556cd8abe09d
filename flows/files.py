"""Shows `runs/` to the browser that shows Prefect's UI: reports, tables, logs, models. Read-only.

    python -m flows.files --host 127.0.0.1 --port 4201

Reports hold text from the data. Scripts and foreign addresses are forbidden by a header, so that nothing in them acts;
dot files, and links that lead out of `runs/`, are not served.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import sys
from pathlib import Path

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: 'self'; sandbox"
AS_TEXT = (".log", ".md", ".yaml", ".jsonl", ".json", ".csv", ".jinja")


class Handler(http.server.SimpleHTTPRequestHandler):
    """GET and HEAD below one folder."""

    def send_head(self):  # type: ignore[no-untyped-def]  # as the base class has it
        """Refuse what leads out of the folder."""
        root = Path(self.directory).resolve()
        path = Path(self.translate_path(self.path))
        if not path.resolve().is_relative_to(root) or any(
            part.startswith(".") for part in path.relative_to(root).parts
        ):
            self.send_error(404)
            return None
        return super().send_head()

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


def main() -> int:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="flows.files", description="show runs/ to a browser")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4201)
    parser.add_argument("--folder", default="runs")
    options = parser.parse_args()
    Path(options.folder).mkdir(exist_ok=True)
    handler = functools.partial(Handler, directory=str(Path(options.folder).resolve()))
    with http.server.ThreadingHTTPServer((options.host, options.port), handler) as server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
