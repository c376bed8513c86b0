"""Clients as people use them, against a live server: all they are told is its address."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from cabochon.lm import LM
from servers import MODEL, Running


class Place(BaseModel):
    """Somewhere."""

    city: Literal["Oslo", "Rome"]
    warm: bool


# langchain-openai


@pytest.fixture
def chain(server: Running) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=f"{server.url}/v1", api_key="none", temperature=0, max_retries=0)


def test_langchain(chain: Any, question: str, expected: str) -> None:
    got = chain.invoke(question)
    assert got.content == expected and got.usage_metadata["total_tokens"] > 0
    assert "".join(part.content for part in chain.stream(question)) == expected
    assert [one.content for one in chain.batch([question] * 3)] == [expected] * 3


def test_langchain_async(chain: Any, question: str, expected: str) -> None:
    async def both() -> list[str]:
        whole = await chain.ainvoke(question)
        return [whole.content, "".join([part.content async for part in chain.astream(question)])]

    assert asyncio.run(both()) == [expected, expected]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured(chain: Any, question: str, method: str) -> None:
    assert isinstance(chain.with_structured_output(Place, method=method).invoke(question), Place)


def test_langchain_tools(chain: Any, question: str) -> None:
    got = chain.bind_tools([Place], tool_choice="required").invoke(question)
    (call,) = got.tool_calls
    assert call["name"] == "Place" and Place.model_validate(call["args"])


def test_langchain_embeddings(server: Running, lm: LM) -> None:
    from langchain_openai import OpenAIEmbeddings

    ours = OpenAIEmbeddings(model=MODEL, base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False)
    assert [len(vector) for vector in ours.embed_documents(["a", "b"])] == [lm.config.hidden_size] * 2


# huggingface_hub


@pytest.fixture
def hub(server: Running) -> Any:
    from huggingface_hub import InferenceClient

    return InferenceClient(base_url=server.url)


def test_hub_chat(hub: Any, question: str, expected: str) -> None:
    messages = [{"role": "user", "content": question}]
    got = hub.chat_completion(messages, model=MODEL, temperature=0, max_tokens=100)
    assert got.choices[0].message.content == expected
    parts = hub.chat_completion(messages, model=MODEL, temperature=0, max_tokens=100, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected


def test_hub_structured(hub: Any, question: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": Place.model_json_schema()}}
    got = hub.chat_completion([{"role": "user", "content": question}], model=MODEL, response_format=schema)
    assert Place.model_validate_json(got.choices[0].message.content)


def test_hub_text_generation(server: Running, lm: LM) -> None:
    """As text-generation-inference is asked: its own route, whole and as a stream of tokens with details."""
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=f"{server.url}/generate")
    expected = lm.generate("Once upon", max_new_tokens=8).text
    assert client.text_generation("Once upon", max_new_tokens=8) == expected
    details = client.text_generation("Once upon", max_new_tokens=8, details=True)
    assert details.generated_text == expected and details.details.generated_tokens == 8
    parts = list(client.text_generation("Once upon", max_new_tokens=8, stream=True, details=True))
    assert "".join(part.token.text for part in parts) == expected == parts[-1].generated_text


def test_hub_async(server: Running, question: str, expected: str) -> None:
    from huggingface_hub import AsyncInferenceClient

    async def both() -> list[str]:
        async with AsyncInferenceClient(base_url=server.url) as client:
            messages = [{"role": "user", "content": question}]
            whole = await client.chat_completion(messages, model=MODEL, temperature=0)
            parts = await client.chat_completion(messages, model=MODEL, temperature=0, stream=True)
            text = "".join([part.choices[0].delta.content or "" async for part in parts])
            return [whole.choices[0].message.content, text]

    assert asyncio.run(both()) == [expected, expected]


# llm


@pytest.fixture
def llm_home(server: Running, tmp_path: Path) -> Path:
    """The folder in which llm is told of a model, as its own documentation says."""
    model = {"model_id": "ours", "model_name": MODEL, "api_base": f"{server.url}/v1", "supports_schema": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([{**model, "supports_tools": True}]))
    return tmp_path


def llm(home: Path, *arguments: str) -> str:
    environment = {**os.environ, "LLM_USER_PATH": str(home), "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_llm(llm_home: Path, question: str, expected: str) -> None:
    assert llm(llm_home, "-m", "ours", "-o", "temperature", "0", question).strip() == expected
    assert llm(llm_home, "-m", "ours", "-o", "temperature", "0", "--no-stream", question).strip() == expected
    schema = json.dumps(Place.model_json_schema())
    assert Place.model_validate_json(llm(llm_home, "-m", "ours", "--schema", schema, question))


def test_llm_in_python(server: Running, question: str, expected: str) -> None:
    from llm.default_plugins.openai_models import AsyncChat, Chat

    named = {"model_name": MODEL, "api_base": f"{server.url}/v1"}
    chat = Chat("ours", key="none", **named)
    conversation = chat.conversation()
    assert conversation.prompt(question, temperature=0).text() == expected
    assert conversation.prompt("Thanks!", temperature=0).text()
    assert "".join(chat.prompt(question, temperature=0, stream=True)) == expected

    async def ask() -> str:
        return await AsyncChat("ours", key="none", **named).prompt(question, temperature=0).text()

    assert asyncio.run(ask()) == expected


# litellm


@pytest.fixture
def asked(server: Running, question: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": f"openai/{MODEL}", "api_base": f"{server.url}/v1", "api_key": "none", "messages": messages,
            "temperature": 0}  # fmt: skip


def test_litellm(asked: dict[str, Any], expected: str) -> None:
    import litellm

    assert litellm.completion(**asked).choices[0].message.content == expected
    parts = litellm.completion(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    got = litellm.completion(**asked, response_format=Place)
    assert Place.model_validate_json(got.choices[0].message.content)


def test_litellm_async(asked: dict[str, Any], expected: str) -> None:
    import litellm

    async def both() -> list[str]:
        whole = await litellm.acompletion(**asked)
        parts = await litellm.acompletion(**asked, stream=True)
        return [whole.choices[0].message.content, "".join([p.choices[0].delta.content or "" async for p in parts])]

    assert asyncio.run(both()) == [expected, expected]


def test_litellm_knows_our_errors(asked: dict[str, Any]) -> None:
    import litellm

    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**asked, "model": "openai/other"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**asked, max_tokens=-1)


def test_litellm_tools_and_embeddings(asked: dict[str, Any], lm: LM) -> None:
    import litellm

    tool = {"type": "function", "function": {"name": "place", "parameters": Place.model_json_schema()}}
    got = litellm.completion(**asked, tools=[tool], tool_choice="required")
    assert Place.model_validate_json(got.choices[0].message.tool_calls[0].function.arguments)
    places = {name: asked[name] for name in ("model", "api_base", "api_key")}
    assert len(litellm.embedding(input=["a"], **places).data[0]["embedding"]) == lm.config.hidden_size
