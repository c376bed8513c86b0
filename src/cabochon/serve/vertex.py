"""The route that Vertex AI asks: {"instances": [...]} in, {"predictions": [...]} out, one for each."""

import asyncio
from typing import Annotated, Any

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from cabochon.serve import openai, tgi
from cabochon.serve.errors import ApiError
from cabochon.serve.fields import Lenient, Text
from cabochon.serve.wire import JsonResponse, read

FORMAT = "@requestFormat"
Instance = Text | dict[str, Any]


class PredictRequest(Lenient):
    """What Vertex AI sends. `parameters` hold for every instance that does not say otherwise."""

    instances: Annotated[list[Instance], Field(fail_fast=True, min_length=1, max_length=4096)]
    parameters: dict[str, Any] | None = None


async def predict(request: Request) -> Response:
    """POST to the route that AIP_PREDICT_ROUTE names.

    An instance is a text, {"prompt", ...fields of /v1/completions} or {"inputs", "parameters"} as /generate has it: its
    prediction is a text. With "@requestFormat": "chatCompletions" it is a body of /v1/chat/completions, and so is the
    prediction.
    """
    asked = await read(request, PredictRequest)
    most = openai.service_of(request).settings.max_prompts
    if len(asked.instances) > most:
        raise ApiError(400, f"instances: at most {most} at a time", code="invalid_value", param="instances")
    tasks = [asyncio.ensure_future(_one(request, i, asked)) for i in range(len(asked.instances))]
    try:
        return JsonResponse({"predictions": await asyncio.gather(*tasks)})
    finally:
        for task in tasks:
            task.cancel()


async def _one(request: Request, number: int, asked: PredictRequest) -> Any:
    instance, shared = asked.instances[number], asked.parameters or {}
    fields: dict[str, Any] = {"prompt": instance} if isinstance(instance, str) else dict(instance)
    kind = fields.pop(FORMAT, None)
    if kind not in (None, "chatCompletions"):
        raise ApiError(400, f"instances[{number}]: {FORMAT} can be chatCompletions", code="invalid_value")
    if {**shared, **fields}.get("stream"):
        raise ApiError(400, f"instances[{number}]: a prediction is no stream", code="invalid_value", param="stream")
    if kind:
        return orjson.loads((await _ask(openai.chat, request, {**shared, **fields})).body)
    if "inputs" in fields:
        given = fields.get("parameters")
        fields["parameters"] = {**shared, **given} if isinstance(given, dict) else shared if given is None else given
        return orjson.loads((await _ask(tgi.generate, request, fields)).body)["generated_text"]
    answer = orjson.loads((await _ask(openai.completions, request, {**shared, **fields})).body)
    texts = [choice["text"] for choice in answer["choices"]]
    return texts[0] if len(texts) == 1 else texts


async def _ask(route: Any, request: Request, body: dict[str, Any]) -> Response:
    """Another route's answer to a body, for the same client."""
    content = orjson.dumps(body)
    given = False

    async def receive() -> Message:
        nonlocal given
        if given:
            return await request.receive()  # which says when the client has gone
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    answer: Response = await route(Request(dict(request.scope), receive))
    return answer
