"""A hub that fails now and then: a real HTTP server on loopback with one model and one dataset, for the hub's own client."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAWS = [{"text": f"Article {n}. A bank keeps ratio {n} at or above {n * 7 % 90 + 10} percent."} for n in range(200)]
REPOSITORIES = {
    "nobody/model": {"config.json": b"{}", "model.safetensors": b"weights"},
    "nobody/data": {"test.jsonl": "".join(json.dumps(law) + "\n" for law in LAWS).encode()},
}


class Hub(ThreadingHTTPServer):
    """Answers as the hub does. `failures` says what it does before, one a request: a status, 0 to hang up, 200 to answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.failures: list[int] = []
        self.asked_at: list[float] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to name."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        name = next((name for name in REPOSITORIES if f"/{name}" in self.path), None)
        if name is None:  # what else the hub's client asks for: which agent it runs under
            self.send_error(404)
            return
        self.server.asked_at.append(time.monotonic())
        self.server.tokens.add(self.headers.get("Authorization"))
        status = self.server.failures.pop(0) if self.server.failures else 200
        if not status:
            self.close_connection = True
            self.connection.close()
        elif status != 200:
            self.send_error(status)
        else:
            self.answer(name, REPOSITORIES[name])

    def answer(self, name: str, files: dict[str, bytes]) -> None:
        if "/resolve/" in self.path:
            wanted = self.path.split("?")[0].rsplit("/", 1)[-1]
            self.reply(files.get(wanted, b""), known=wanted in files)
        elif "/tree/" in self.path or "/paths-info/" in self.path:
            self.reply_json([{"type": "file", "path": file, "oid": "0" * 40, "size": len(content)}
                             for file, content in files.items()])  # fmt: skip
        else:
            self.reply_json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})

    def reply_json(self, content: object) -> None:
        self.reply(json.dumps(content).encode())

    def reply(self, body: bytes, known: bool = True) -> None:
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(body)}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""
