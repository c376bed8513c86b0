"""Requests that nobody thought of: whatever is sent, the answer is one that the document describes."""

import itertools
import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cabochon.serve.conversation import turns
from cabochon.serve.fields import ChatMessage, ChatRequest, CompletionRequest
from cabochon.serve.openapi import document
from cabochon.serve.settings import ServeSettings
from servers import CHAT, Running, asks

PATHS = ["/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/generate", CHAT]
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "input", "inputs", "tokens", "parameters"})
fuzzed = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
DESCRIBED = document(ServeSettings())["paths"]


def check(response: httpx.Response, path: str) -> None:
    assert response.status_code < 500, response.text
    assert str(response.status_code) in DESCRIBED[path]["post"]["responses"], response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert isinstance(error, str) or set(error) == {"message", "type", "param", "code"}


@fuzzed
@given(path=st.sampled_from(PATHS), body=st.dictionaries(st.sampled_from(names), anything, max_size=6))
def test_fields_with_anything_in_them(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    check(sent(client, path, body), path)


def sent(client: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    """Posted as Python writes it: NaN, infinity and lone surrogates go out as well."""
    content = json.dumps(body, allow_nan=True).encode("utf-8", "surrogatepass")
    return client.post(path, content=content, headers={"content-type": "application/json"})


@fuzzed
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=200))
def test_bytes(client: httpx.Client, path: str, content: bytes) -> None:
    check(client.post(path, content=content, headers={"content-type": "application/json"}), path)


@fuzzed
@given(fields=st.dictionaries(st.sampled_from(names), anything, max_size=2), stream=st.booleans())
def test_a_good_request_with_something_odd(client: httpx.Client, fields: dict[str, Any], stream: bool) -> None:
    body = {**asks("Hi", max_tokens=2, stream=stream), **fields}
    check(sent(client, CHAT, body), CHAT)


@fuzzed
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=60))
def test_any_text_survives(client: httpx.Client, text: str) -> None:
    tokens = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text.replace("\u2581", " ")
    got = client.post("/v1/completions", json={"prompt": text, "max_tokens": 1, "echo": True, "temperature": 0})
    assert got.json()["choices"][0]["text"].startswith(text)


messages = st.builds(
    ChatMessage,
    role=st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
    content=st.text(max_size=10) | st.none(),
)


@given(st.lists(messages, min_size=1, max_size=8))
def test_any_conversation_becomes_turns(conversation: list[ChatMessage]) -> None:
    folded = turns(conversation)
    assert all(a["role"] != b["role"] for a, b in itertools.pairwise(folded))
    said = "".join(message["content"] for message in folded)
    for message in conversation:
        assert (message.content or "").strip() in said


def test_nothing_is_left_behind(server: Running) -> None:
    assert not server.bridge.pending
