"""Requests that want to do harm: none is answered with 5xx or takes long, and the next normal one is right."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from servers import CHAT, Running, asks

MAX_SECONDS = 20.0  # of a request on a busy machine; `benchmarks/` measures properly


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def nested(levels: int, inner: Any = None) -> Any:
    value: Any = inner if inner is not None else {"type": "string"}
    for _ in range(levels):
        value = {"type": "object", "properties": {"a": value}, "required": ["a"], "additionalProperties": False}
    return value


def message(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def chain(length: int) -> dict[str, Any]:
    links: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "string"}}}


NUMBERS = [-1, 0, 0.5, 10**9, 10**30, -(10**30), 1e308, 2**63, 2**64, True, None, "1", [], {}, [1]]
FIELDS = ["n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "top_logprobs",
          "repetition_penalty", "presence_penalty"]  # fmt: skip
PATTERNS = ["(a+)+$", "(a|a)*b", "((a*)*)*", "(.*)*x", "a{1000}{1000}", "(?:a{0,1000}){0,1000}", "[a-z]{1,100000}",
            "(x+x+)+y", ".*.*.*.*.*.*=.*", "(" * 500 + ")" * 500, "\\", "[", "(?P<", "(?=a)b", "\\1", "a" * 4096,
            "a" * 4097, "\\p{L}{500}", "(?i)" + "k" * 100, "^$", "", "\x00", "\U0010ffff{3}", "|" * 1000]  # fmt: skip
SCHEMAS: list[Any] = [
    nested(70), nested(60), chain(60), chain(3000), {"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, {"not": {}},
    {"$ref": "http://169.254.169.254/latest/meta-data"}, {"$ref": "file:///etc/passwd"}, {"type": "string",
    "pattern": "(a+)+$"},
    {"type": "integer", "minimum": 10**40}, {"type": "number", "multipleOf": 1e-300}, {"enum": []},
    {"enum": ["x" * 60_000]},
    {"enum": list(range(20_000))}, {"type": "array", "minItems": 10**9}, {"type": "string", "minLength": 10**9},
    {"type": "string", "maxLength": 2**62}, {"type": "object", "minProperties": 10**6}, {"anyOf": [{}] * 5000},
    {"oneOf": [{"type": "string"}] * 2000}, {"properties": {str(i): {"type": "string"} for i in range(3000)}},
    {"type": "string", "format": "regex"}, {"const": None}, {"type": []}, {"type": 5}, {"properties": []},
    {"x-guidance": {"lenient": True}, "type": "object"}, {"x-guidance": 5}, {"pattern": "\\", "type": "string"},
    {"type": "object", "patternProperties": {".*" * 60: {}}}, {"prefixItems": [{}] * 3000, "type": "array"},
    {"if": {"type": "string"}, "then": {"minLength": 3}}, {"uniqueItems": True, "type": "array"},
    {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}, "$ref": "#/$defs/a"},
]  # fmt: skip
FLOODS: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": [None] * 400_000}), ("/v1/completions", {"prompt": [[]] * 600_000}),
    ("/v1/completions", {"prompt": [1] * 900_000}), ("/v1/completions", {"prompt": ["a"] * 450_000}),
    ("/v1/completions", {"prompt": [[None]] * 250_000}), ("/v1/completions", {"prompt": [[1]] * 4096}),
    ("/detokenize", {"tokens": [-1] * 600_000}), ("/tokenize", {"messages": [{}] * 600_000}),
    (CHAT, {"messages": [{"role": "user", "content": [{}] * 600_000}]}), (CHAT, {str(i): 1 for i in range(180_000)}),
    (CHAT, {**asks("x"), "stream_options": {str(i): 1 for i in range(180_000)}}),
    (CHAT, {**asks("x"), "logit_bias": {str(-i): 1 for i in range(150_000)}}),
    (CHAT, {**asks("x"), "stop": [None] * 400_000}), (CHAT, {**asks("x"), "tools": [{}] * 600_000}),
    (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [{}] * 600_000}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 60_000}]}),
]  # fmt: skip
BODIES: list[dict[str, Any]] = [
    *({field: value} for field in ("n", "max_tokens", "temperature", "seed") for value in NUMBERS),
    *({field: [[[[]]]]} for field in FIELDS),
    *({"regex": pattern, "max_tokens": 30} for pattern in PATTERNS),
    *({**schema(value), "max_tokens": 30} for value in SCHEMAS),
    *({"model": name} for name in ("/etc/passwd", "../..", "\x00", "a" * 300, "", "%2e%2e", "file:///", "💥")),
    message("<eos>" * 20_000), message("<start_of_turn>" * 5000), message("\x00" * 3000), message("\ufffd" * 3000),
    message("🏴󠁧󠁢󠁥󠁮󠁧󠁿" * 500), message("a\u0301" * 2000), message(" " * 100_000), message("\n" * 100_000),
    message("▁" * 1000),
    message([{"type": "text", "text": "x"}] * 5000), message([{"type": "image_url",
    "image_url": {"url": "http://127.0.0.1/"}}]),
    message([{"type": "input_audio"}]), message({}), message(5), message(None), message(""),
    {"messages": [{"role": "user", "content": "x"}] * 4096}, {"messages": [{"role": "user", "content": "x"}] * 5000},
    {"messages": [{"role": "assistant", "content": "x"}]}, {"messages": [{"role": "system", "content": ""}]},
    {"messages": {}}, {"messages": "x"}, {"messages": [[]]}, {"messages": [None]},
    {"messages": [{"role": "user\x00", "content": "x"}]}, {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
    {"stop": ["\ufffd" * 256] * 16}, {"stop": ["a" * 257]}, {"stop": "\x00"}, {"stop": ["e", "", "n"]},
    {"logit_bias": {str(i): 100 for i in range(1025)}}, {"logit_bias": {str(i): -100 for i in range(1024)}},
    {"logit_bias": {"-1": 1}}, {"logit_bias": {"1e3": 1}}, {"logit_bias": {"99999999999999": 1}},
    {"logit_bias": {"107": 100}, "n": 8}, {"logprobs": True, "top_logprobs": 20, "n": 8},
    {"choice": ["x"] * 1024}, {"choice": [""]}, {"choice": []}, {"choice": ["\x00"]}, {"choice": ["x" * 70_000]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(400)}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/a/b"}}}]},
    {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(128)], "tool_choice": "required"},
    {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]},
    {"tools": [{"type": "code_interpreter"}]}, {"tool_choice": {"type": "function"}}, {"stream_options": 5},
    {"stream": "yes"}, {"user": {}}, {"metadata": {"a": nested(300)}}, {"__proto__": {}}, {"__class__": "x"}, {"": 1},
]  # fmt: skip
DEEP = b"[" * 1000 + b"]" * 1000
QUESTION = b'{"messages":[{"role":"user","content":"x"}],'
RAW = [
    QUESTION + b'"tools":[{"type":"function","function":{"name":"f","parameters":{"a":' + DEEP + b"}}}]}",
    QUESTION + b'"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"enum":' + DEEP + b"}}}}",
    b'{"messages":' + DEEP + b"}",
    b"", b"{", b"null", b"[]", b"5", b'"x"', b"{}{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"messages": NaN}',
    b"[" * 100_000,
    b'{"a":' * 50_000, b"{" + b'"a":1,' * 50_000 + b'"b":2}',
    b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    b'{"messages":[{"role":"user","content":"\\ud800"}]}', b'{"messages":[{"role":"user","content":"\\udc00\\ud800"}]}',
    b'{"messages":[{"role":"user","content":"\xc0\xaf"}]}', b'{"temperature":1e999}', b'{"temperature":-Infinity}',
    b'{"max_tokens":' + b"9" * 100_000 + b"}", b'{"temperature":0.' + b"1" * 100_000 + b"}", b"\x00" * 1000,
    b" " * 2_000_000,
    b'{"messages":[],"messages":[]}', b"{'messages':[]}", b'{"messages":[{"role":"user","content":"x"}],}', b"// x\n{}",
    b"\x1f\x8b\x08\x00", b'{"regex":"\\ud83d","messages":[{"role":"user","content":"x"}]}',
]  # fmt: skip
GET, POST = (b"%s HTTP/1.1\r\nHost: localhost\r\n" % line for line in (b"GET /", b"POST /tokenize"))
WIRE = [
    b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    GET + b"" + b"a: b\r\n" * 30_000 + b"\r\n",
    GET + b"x: " + b"y" * 500_000 + b"\r\n\r\n",
    GET + b"Host: evil\r\n\r\n", b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    b"GET http://evil/ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT evil:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%ff%fe%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    GET + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    GET + b"Connection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n",
    POST + b"Content-Type: application/json\r\nContent-Length: -1\r\n\r\n{}",
    POST + b"Content-Type: application/json\r\nContent-Length: 99999999999999999\r\n\r\n{}",
    POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    POST + b"Expect: 100-continue\r\nContent-Length: 9999999\r\n\r\n",
    GET + b"Cookie: " + b"a=b;" * 10_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\rSet-Cookie: b\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n", b"get / http/1.1\r\nhost: localhost\r\n\r\n",
]  # fmt: skip


@pytest.fixture(autouse=True)
def still_right(server: Running) -> Iterator[None]:
    """After each of these, a normal request is answered as ever, and nothing is left behind."""
    yield
    with server.client() as client:
        got = client.post(CHAT, json=asks("What is 2+3?", max_tokens=4))
        assert got.status_code == 200 and got.json()["choices"][0]["message"]["content"] == "ones: 2"
    assert not server.bridge.pending


def is_fine(response: httpx.Response, begun: float) -> None:
    assert time.monotonic() - begun < MAX_SECONDS
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error if "error_type" in response.json() else error["message"], response.text


def test_there_are_enough_of_them() -> None:
    assert len(BODIES) + len(RAW) + len(WIRE) >= 250


@pytest.mark.parametrize("number", range(0, len(BODIES), 12))
def test_bodies(client: httpx.Client, number: int) -> None:
    for fields in BODIES[number : number + 12]:
        begun = time.monotonic()
        is_fine(client.post(CHAT, json={"max_tokens": 5, **asks("Hi"), **fields}), begun)


@pytest.mark.parametrize("number", range(len(FLOODS)))
def test_floods_cost_little(client: httpx.Client, number: int) -> None:
    import resource

    path, body = FLOODS[number]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.monotonic()
    is_fine(client.post(path, json=body), begun)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB: no record for each entry


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/generate"])
def test_raw_bodies(client: httpx.Client, path: str) -> None:
    for body in RAW:
        begun = time.monotonic()
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert time.monotonic() - begun < MAX_SECONDS
        assert response.status_code in (400, 422), (body[:50], response.text)


@pytest.mark.parametrize("number", range(len(WIRE)))
def test_bytes_on_the_wire(server: Running, number: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=MAX_SECONDS) as connection:
        said = b""
        try:
            connection.sendall(WIRE[number])
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                said += part
        except OSError:  # the server may hang up at any point: shutdown says ENOTCONN then, not ECONNRESET
            pass
    assert b"HTTP/1.1 5" not in said and b"Traceback" not in said and b"\nset-cookie" not in said.lower()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [[1] * 5000] * 3}),
        ("/v1/completions", {"prompt": [[]] * 64}),
        ("/v1/completions", {"prompt": ["x"] * 64, "n": 8, "max_tokens": 1, "logprobs": 20}),
        ("/v1/completions", {"prompt": list(range(2000))}),
        ("/v1/completions", {"prompt": [2**40]}),
        ("/v1/completions", {"prompt": "", "max_tokens": 1}),
        ("/v1/embeddings", {"input": ["x" * 4000] * 65}),
        ("/v1/embeddings", {"input": [""]}),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}),
        ("/tokenize", {"prompt": "<eos>" * 100_000}),
        ("/tokenize", {"prompt": "a" * 1_000_000}),
        ("/tokenize", {"prompt": "<" * 500_000}),
        ("/tokenize", {"prompt": "\u0300" * 300_000}),
        ("/detokenize", {"tokens": [5] * 400_000}),
        ("/detokenize", {"tokens": [2**62]}),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 10**9, "stop": ["a"]}}),
        ("/generate", {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": {"$ref": "#"}}}}),
        ("/generate", {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": {"a": 1}}}}),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_other_routes(client: httpx.Client, path: str, body: Any) -> None:
    begun = time.monotonic()
    is_fine(client.post(path, json=body), begun)
