"""OpenAI's own client, as people use it, against a live server."""

import asyncio
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from cabochon.lm import LM
from servers import MODEL, Running

QUESTION: Any = [{"role": "user", "content": "What is 2+3?"}]


@pytest.fixture
def ours(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def expected(lm: LM) -> str:
    return lm.chat(QUESTION, max_new_tokens=100).text


def test_chat(ours: openai.OpenAI, expected: str) -> None:
    got = ours.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert got.choices[0].message.content == expected and got.usage and got.usage.total_tokens > 0
    stream = ours.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == got.usage.completion_tokens


def test_stream_helper(ours: openai.OpenAI, expected: str) -> None:
    with ours.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == expected and "content.done" in kinds


def test_async(server: Running, expected: str) -> None:
    async def both() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
            stream = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return whole.choices[0].message.content, text

    assert asyncio.run(both()) == (expected, expected)


class Place(BaseModel):
    city: Literal["Oslo", "Rome"]
    warm: bool


def test_parse(ours: openai.OpenAI) -> None:
    got = ours.chat.completions.parse(model=MODEL, messages=QUESTION, temperature=0, response_format=Place)
    assert isinstance(got.choices[0].message.parsed, Place)


def test_tools(ours: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Place)
    got = ours.chat.completions.parse(
        model=MODEL, messages=QUESTION, temperature=0, tools=[tool], tool_choice="required"
    )
    (call,) = got.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Place)
    result: Any = [
        *QUESTION,
        got.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    again = ours.chat.completions.create(model=MODEL, messages=result, temperature=0, max_tokens=5)
    assert again.choices[0].message.content
    with ours.chat.completions.stream(
        model=MODEL, messages=QUESTION, temperature=0, tools=[tool], tool_choice="required"
    ) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls" and streamed.message.tool_calls
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments


def test_the_rest(ours: openai.OpenAI, lm: LM) -> None:
    text = ours.completions.create(model=MODEL, prompt="Once upon", max_tokens=5, temperature=0)
    assert text.choices[0].text == lm.generate("Once upon", max_new_tokens=5).text
    assert [m.id for m in ours.models.list()] == [MODEL] and ours.models.retrieve(MODEL).id == MODEL
    vector = ours.embeddings.create(model=MODEL, input=["a", "b"]).data[1].embedding  # asks for base64 by itself
    assert len(vector) == lm.config.hidden_size and isinstance(vector[0], float)


def test_errors_have_their_classes(ours: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ours.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError):
        ours.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.UnprocessableEntityError):
        ours.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"regex": "("})


def test_leaving_a_stream_ends_it(ours: openai.OpenAI, server: Running) -> None:
    from servers import wait_until

    long = ours.chat.completions.create(
        model=MODEL, messages=QUESTION, stream=True, extra_body={"regex": "[a-z ]{900,}"}
    )
    next(iter(long))
    long.close()
    wait_until(lambda: not server.bridge.pending)
