"""The other routes: completions, embeddings, models, counting tokens, and text-generation-inference's."""

import base64
import struct
from typing import Any

import httpx
import pytest
import torch

from cabochon.lm import LM
from servers import MODEL, events

TEXT = "/v1/completions"


def complete(client: httpx.Client, prompt: Any, **fields: Any) -> dict[str, Any]:
    response = client.post(TEXT, json={"prompt": prompt, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_text_goes_on_as_the_model_says(client: httpx.Client, lm: LM) -> None:
    expected = lm.generate("Once upon", max_new_tokens=8)
    got = complete(client, "Once upon", max_tokens=8)
    assert got["object"] == "text_completion" and got["id"].startswith("cmpl-")
    assert got["choices"][0]["text"] == expected.text
    ids = lm.text_tokenizer.encode("Once upon")
    assert complete(client, ids, max_tokens=8)["choices"] == got["choices"]


def test_several_prompts_and_answers(client: httpx.Client) -> None:
    alone = [complete(client, p, max_tokens=6)["choices"][0]["text"] for p in ("One", "The sky")]
    got = complete(client, ["One", "The sky"], n=2, max_tokens=6)
    assert [c["index"] for c in got["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in got["choices"]] == [alone[0], alone[0], alone[1], alone[1]]


def test_a_stream_of_text(client: httpx.Client) -> None:
    whole = complete(client, ["One", "The sky"], max_tokens=6, echo=True)
    body = {"prompt": ["One", "The sky"], "temperature": 0, "max_tokens": 6, "echo": True, "stream": True}
    *parts, usage, done = events(client, TEXT, {**body, "stream_options": {"include_usage": True}})
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12
    texts = ["", ""]
    for part in parts:
        (choice,) = part["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [c["text"] for c in whole["choices"]]
    assert [c["text"][:3] for c in whole["choices"]] == ["One", "The"]


def test_where_tokens_stand_in_the_text(client: httpx.Client) -> None:
    choice = complete(client, "Once upon", max_tokens=8, logprobs=2)["choices"][0]
    said = choice["logprobs"]
    assert "".join(said["tokens"]) == choice["text"]
    assert all(choice["text"][o:].startswith(t) for o, t in zip(said["text_offset"], said["tokens"], strict=True))
    assert all(len(top) == 2 for top in said["top_logprobs"])
    parts = events(client, TEXT, {"prompt": "Once upon", "temperature": 0, "max_tokens": 8, "logprobs": 2,
                                  "stream": True})[:-1]  # fmt: skip
    offsets = [o for p in parts for o in p["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == said["text_offset"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []}, {"prompt": [[]]}, {"prompt": [5000]}, {"prompt": [-1]}, {"prompt": ["x", 1]}, {"prompt": None},
        {"prompt": ["x"] * 65}, {"best_of": 3}, {"suffix": "y"}, {"echo": True, "logprobs": 1}, {"logprobs": 21},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(client: httpx.Client, fields: dict[str, Any]) -> None:
    response = client.post(TEXT, json={"prompt": "x", **fields})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_embeddings_are_means_of_hidden_states(client: httpx.Client, lm: LM) -> None:
    texts = ["The sky is blue.", "Hi"]
    got = client.post("/v1/embeddings", json={"input": texts, "model": MODEL}).json()
    assert [row["index"] for row in got["data"]] == [0, 1] and got["usage"]["prompt_tokens"] > 0
    for text, row in zip(texts, got["data"], strict=True):
        with torch.inference_mode():
            hidden = lm.model.hidden(torch.tensor([lm.text_tokenizer.encode(text)]))[0].double()
        torch.testing.assert_close(torch.tensor(row["embedding"]).double(), hidden.mean(0), rtol=1e-3, atol=1e-3)
    packed = client.post("/v1/embeddings", json={"input": "Hi", "encoding_format": "base64"}).json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(got["data"][1]["embedding"])
    refused = client.post("/v1/embeddings", json={"input": "Hi", "dimensions": 7})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "dimensions"


def test_models(client: httpx.Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == MODEL and card["max_model_len"] == 1024
    assert client.get(f"/v1/models/{MODEL}").json() == card
    for name in ("gpt-4", "..%2f..%2fetc%2fpasswd", "a/b"):
        response = client.get(f"/v1/models/{name}")
        assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_tokens_there_and_back(client: httpx.Client, lm: LM) -> None:
    text = "Zwölf Boxkämpfer <eos> jagen 漢字 \U0001f44d"
    got = client.post("/tokenize", json={"prompt": text}).json()
    assert got["tokens"] == lm.text_tokenizer.encode(text) and got["count"] == len(got["tokens"])
    assert client.post("/detokenize", json={"tokens": got["tokens"]}).json() == {"prompt": text}
    named = client.post("/detokenize", json={"tokens": got["tokens"], "skip_special_tokens": False}).json()
    assert named == {"prompt": f"<bos>{text}"}
    bare = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == got["tokens"][1:]
    assert client.post("/tokenize", json={}).status_code == 400
    assert client.post("/detokenize", json={"tokens": [4096]}).status_code == 400


def test_generate(client: httpx.Client, lm: LM) -> None:
    expected = lm.generate("Once upon", max_new_tokens=8)
    asked = {"inputs": "Once upon", "parameters": {"max_new_tokens": 8, "details": True, "watermark": False}}
    got = client.post("/generate", json=asked).json()
    assert got["generated_text"] == expected.text
    assert [t["id"] for t in got["details"]["tokens"]] == expected.token_ids
    assert got["details"]["generated_tokens"] == 8 and got["details"]["finish_reason"] == "length"
    parts = events(client, "/generate_stream", asked)
    assert [p["token"]["id"] for p in parts] == expected.token_ids
    assert all(p["generated_text"] is None and p["details"] is None for p in parts[:-1])
    assert parts[-1]["generated_text"] == expected.text
    asked["parameters"] |= {"return_full_text": True}
    assert client.post("/generate", json=asked).json()["generated_text"] == f"Once upon{expected.text}"
    held = {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "[ab]{3}"}}}
    assert set(client.post("/generate", json=held).json()["generated_text"]) <= set("ab")
    for bad in ({}, {"inputs": ""}, {"inputs": "x", "parameters": {"temperature": 0}}):
        response = client.post("/generate", json=bad)
        assert response.status_code == 422 and set(response.json()) == {"error", "error_type"}
    assert client.get("/info").json()["max_total_tokens"] == 1024
