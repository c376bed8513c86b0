"""Parts of platforms that containers meet: a bucket with its metadata server, and a place to run a container."""

import base64
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httpx

from servers import wait_until

TINY = Path(__file__).parents[2] / "src" / "cabochon" / "models" / "tiny"
TOKEN = "token-of-a-service-account"


class Bucket(ThreadingHTTPServer):
    """The parts of Cloud Storage's JSON API and of the metadata server that are asked for; two objects to a page.

    Attributes:
        trouble: answers to give first: a status, or "short" for a body without its end.
        asked: the paths of all requests.
    """

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.objects, self.trouble, self.asked = dict(objects), list[Any](), list[str]()
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.environment = {"STORAGE_EMULATOR_HOST": f"http://{self.host}", "GCE_METADATA_HOST": self.host}


class _Answers(BaseHTTPRequestHandler):
    server: Bucket

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/computeMetadata/"):
            known = self.headers["Metadata-Flavor"] == "Google"
            return self._say(200 if known else 403, json.dumps({"access_token": TOKEN}).encode())
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._say(401)
        if self.server.trouble and isinstance(self.server.trouble[0], int):
            return self._say(self.server.trouble.pop(0))
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path == "/storage/v1/b/models/o":
            return self._list(query)
        name = unquote(url.path.removeprefix("/storage/v1/b/models/o/"))
        if "/" in url.path.removeprefix("/storage/v1/b/models/o/") or name not in self.server.objects:
            return self._say(404)
        content = self.server.objects[name]
        if self.server.trouble:
            self.server.trouble.pop()
            return self._say(200, content[:-3], len(content))
        return self._say(200, content)

    def _list(self, query: dict[str, str]) -> None:
        names = [name for name in sorted(self.server.objects) if name.startswith(query["prefix"])]
        start = int(query.get("pageToken", 0))
        items = []
        for name in names[start : start + 2]:
            content = self.server.objects[name]
            md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
            items.append({"name": name, "size": str(len(content)), "md5Hash": md5})
        page = {"items": items} | ({"nextPageToken": str(start + 2)} if start + 2 < len(names) else {})
        self._say(200, json.dumps(page).encode())

    def _say(self, status: int, content: bytes = b"", length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class Toolkit(ThreadingHTTPServer):
    """Inference Endpoints' own server, as far as a handler sees it: made from handler.py with the model's folder."""

    def __init__(self, handler: Path, repository: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Posts)
        spec = importlib.util.spec_from_file_location("handler.EndpointHandler", handler)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.handler = module.EndpointHandler(str(repository))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.server_address[1]}", timeout=60)


class _Posts(BaseHTTPRequestHandler):
    server: Toolkit

    def do_POST(self) -> None:
        try:
            status = 200
            answer: Any = self.server.handler(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        except Exception as error:  # theirs says whatever it is
            status, answer = 400, {"error": str(error), "kind": type(error).__name__}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(server: ThreadingHTTPServer) -> Iterator[None]:
    """A server that answers in a thread."""
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@contextmanager
def bucket(objects: Mapping[str, bytes]) -> Iterator[Bucket]:
    server = Bucket(objects)
    with served(server):
        yield server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Container:
    """A container that runs: the entry point of the image, with only the variables that a platform sets."""

    def __init__(self, environment: Mapping[str, str], port: int, arguments: Sequence[str]) -> None:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        command = [sys.executable, "-m", "cabochon.deploy.container", *arguments]
        environment = {**kept, "OMP_NUM_THREADS": "1", **environment}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def status(self, path: str) -> int:
        """As a probe sees it: 0 where nobody listens yet."""
        assert self.process.poll() is None, self.process.communicate()[1]
        try:
            return self.client.get(path).status_code
        except httpx.TransportError:
            return 0


@contextmanager
def container(
    environment: Mapping[str, str], *, port: int, ready: str, arguments: Sequence[str] = ()
) -> Iterator[Container]:
    """A container, once the platform's probe is content. It is ended as platforms do: SIGTERM, and it has to go."""
    started = Container(environment, port, arguments)
    try:
        wait_until(lambda: started.status(ready) == 200, 90)
        yield started
        started.process.terminate()
        assert started.process.wait(30) == 0
    finally:
        started.process.kill()
        started.process.communicate()
