"""Who may come in, how large a request may be, what pages may do, and what is written down of it."""

import re
from collections.abc import Iterator

import httpx
import pytest

from cabochon.lm import LM
from cabochon.serve.app import routes
from cabochon.serve.guard import OPEN
from cabochon.serve.openapi import document
from cabochon.serve.settings import ServeSettings, key_hash
from servers import CHAT, Running, asks, running

KEYS = ("first-key", "second-kéy")


@pytest.fixture(scope="module")
def locked(lm: LM) -> Iterator[Running]:
    with running(lm, key_hashes=frozenset(map(key_hash, KEYS)), max_body=20_000, max_headers=4096) as server:
        yield server


def paths() -> list[str]:
    return [re.sub(r"\{\w+(:path)?\}", "x", route.path) for route in routes(ServeSettings())]


def test_every_route_but_the_open_ones_needs_a_key(locked: Running) -> None:
    with locked.client() as client:
        closed = [path for path in paths() if path not in OPEN and not path.startswith("/static/")]
        assert len(closed) >= 12
        for path in [*closed, "/nowhere", "//v1/models", "/v1/../v1/models", "/static", "/staticx"]:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
                response = client.request(method, path)
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"] == "Bearer"
        for path in OPEN:
            assert client.get(path).status_code in (200, 404)


def test_each_key_opens_and_nothing_else_does(locked: Running) -> None:
    with locked.client() as client:
        for key in KEYS:
            sent = f"Bearer {key}".encode()
            assert client.get("/v1/models", headers={"Authorization": sent}).status_code == 200
        for sent in (b"Bearer first-ke", b"Bearer first-keyy", b"first-key", b"Basic first-key", b"Bearer",
                     b"Bearer \xff\xfe", "Bearer " + key_hash("first-key").hex()):  # fmt: skip
            assert client.get("/v1/models", headers={"Authorization": sent}).status_code == 401


def test_too_large(locked: Running) -> None:
    auth = {"Authorization": "Bearer first-key"}
    with locked.client(headers=auth) as client:
        response = client.post(CHAT, json=asks("x" * 20_000))
        assert response.status_code == 413 and response.json()["error"]["code"] == "too_large"
        chunks = (b" " * 1000 for _ in range(30))
        response = client.post(CHAT, content=chunks, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert client.get("/v1/models", headers={"x-filler": "x" * 5000}).status_code == 431
        assert client.get("/v1/models?" + "x" * 5000).status_code == 431
        assert client.get("/v1/models", headers={"x-filler": "x" * 3000}).status_code == 200


def test_only_json(client: httpx.Client) -> None:
    # A page of another server could send these without asking: it must not be able to spend our time.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = client.post(CHAT, content=b"{}", headers={"content-type": kind})
        assert response.status_code == 415
    ok = client.post(
        "/tokenize", content=b'{"prompt": "x"}', headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert ok.status_code == 200


def test_another_name_for_this_machine_is_not_answered(client: httpx.Client, lm: LM) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 421
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200
    with running(lm, allowed_hosts=("model.example",)) as named, named.client() as other:
        assert other.get("/health").status_code == 421
        assert other.get("/health", headers={"Host": "model.example:80"}).status_code == 200


def test_other_pages_may_call_only_when_told_so(client: httpx.Client, lm: LM) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    refused = client.options(CHAT, headers=asked)
    assert refused.status_code == 405 and "access-control-allow-origin" not in refused.headers
    with running(lm, cors_origins=("https://page.example",)) as server, server.client() as other:
        told = other.options(CHAT, headers=asked)
        assert told.status_code == 200 and told.headers["access-control-allow-origin"] == "https://page.example"
        failed = other.post(CHAT, json={}, headers={"Origin": "https://page.example"})
        assert failed.status_code == 400 and failed.headers["access-control-allow-origin"] == "https://page.example"
        stranger = other.options(CHAT, headers={**asked, "Origin": "https://stranger.example"})
        assert "access-control-allow-origin" not in stranger.headers


def test_the_page_may_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(p.strip().split(" ", 1) for p in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert client.get(name).status_code == 200, name
    again = client.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize(
    "path",
    ["/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static/\x00",
     "/static/....//app.py", "/static/index.html/..", "/static/"],
)  # fmt: skip
def test_no_file_but_those_of_the_page(server: Running, path: str) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.putrequest("GET", path.replace("\x00", "%00"), skip_host=False)
    connection.endheaders()
    assert connection.getresponse().status == 404


def test_no_file_is_opened_for_a_request(client: httpx.Client) -> None:
    import sys

    opened: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple) -> None:
        if watching and event == "open":
            opened.append(str(arguments[0]))

    client.post(CHAT, json=asks("Hi", max_tokens=2))  # what is read once, is read now
    sys.addaudithook(hook)
    for path in (
        "/",
        "/static/index.html",
        "/static/../../app.py",
        "/v1/models",
        "/v1/models/../../etc/passwd",
        "/info",
    ):
        client.get(path)
    for model in ("/etc/passwd", "../../../etc/passwd", "file:///etc/passwd", "~/.ssh/id_rsa"):
        client.post(CHAT, json=asks("Hi", model=model))
    schema = {"$ref": "file:///etc/passwd"}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    client.post(CHAT, json=asks("Hi", response_format=wanted))
    client.post(CHAT, json=asks("/etc/passwd", max_tokens=4))
    watching = False
    assert opened == []


def test_the_log_names_requests_and_not_what_was_said(lm: LM, capfd: pytest.CaptureFixture[str]) -> None:
    with running(lm) as server, server.client() as client:
        response = client.post(CHAT, json=asks("my secret", max_tokens=2), headers={"X-Request-Id": "abc-1"})
        assert response.headers["x-request-id"] == "abc-1"
        other = client.get("/health", headers={"X-Request-Id": "no\tgood id"})
        assert re.fullmatch("[0-9a-f]{32}", other.headers["x-request-id"])
    log = capfd.readouterr().err
    assert '"request":"abc-1"' in log and '"generated_tokens":2' in log and "secret" not in log
    with running(lm, log_prompts=True, log_json=False) as server, server.client() as client:
        client.post(CHAT, json=asks("my secret", max_tokens=2))
    assert "my secret" in capfd.readouterr().err


def test_the_document_describes_every_route(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    served = {re.sub(":path", "", r.path) for r in routes(ServeSettings())} - {"/", "/static/{path}"}
    assert served == set(described["paths"])
    assert "security" not in described and document(ServeSettings(key_hashes=frozenset({b"x"})))["security"]
    schemas = described["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', client.get("/openapi.json").text))
    assert references <= set(schemas)
