"""A Hub of one process: the few requests that fetching a model makes, and the ways in which they go wrong."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "5" * 40


@dataclass
class FakeHub:
    """What it serves, and what was asked of it."""

    files: dict[str, bytes]  # of the one model, owner/model
    error: tuple[int, str] | None = None  # a status and the Hub's code for it, for every request
    cut_after: dict[str, int] = field(default_factory=dict)  # close the connection after so many bytes, once
    cut_always: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def fetched(self) -> list[str]:
        """Files whose content was asked for."""
        return sorted({path.split(f"/resolve/{COMMIT}/")[1] for verb, path, _ in self.requests
                       if verb == "GET" and "/resolve/" in path})  # fmt: skip


def model_files(folder: Path) -> dict[str, bytes]:
    """The content of a model folder, and things beside it that must never be fetched."""
    unwanted = {"pytorch_model.bin": b"pickle", "modeling.py": b"code", "other/model.safetensors": b"again"}
    return {file.name: file.read_bytes() for file in folder.iterdir()} | unwanted


@contextlib.contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve on a free port of this machine."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.served, self.path.split("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.error:
            status, code = hub.error
            self._send(status, b"{}", {"X-Error-Code": code})
        elif re.fullmatch(rf"/api/models/owner/model/revision/(main|{COMMIT})|/api/models/owner/model", path):
            self._send(200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("/api/models/owner/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _hash(data)}
                for name, data in hub.files.items()
            ]
            self._send(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/owner/model/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/owner/model/resolve/{COMMIT}/"):
            self._file(path.split(COMMIT + "/")[1])
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        hub, data = self.served, self.served.files[name]
        headers = {"ETag": f'"{_hash(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and name in hub.cut_after:
            cut = hub.cut_after[name] if hub.cut_always else hub.cut_after.pop(name)
            self._send(206 if asked else 200, data[start:], headers, stop=cut)
            self.close_connection = True
        else:
            self._send(206 if asked else 200, data[start:], headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, stop: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop])


def _hash(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
