"""OpenAI's routes: chat, completions, models, embeddings; and the two of vLLM that count tokens."""

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from cabochon.base.errors import CabochonError
from cabochon.generate.grammar import Constraint
from cabochon.lm import LM
from cabochon.serve.bridge import Bridge
from cabochon.serve.conversation import turns
from cabochon.serve.errors import ApiError, spoken
from cabochon.serve.fields import (
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from cabochon.serve.service import Service
from cabochon.serve.shapes import ChatShape, TextShape
from cabochon.serve.tools import call_constraint, usable_tools
from cabochon.serve.wire import EventStream, JsonResponse, note, read, unless_gone, whole
from cabochon.text.chat import Message, encode_chat


def service_of(request: Request) -> Service:
    """The server's state."""
    found: Service = request.app.state.service
    return found


async def chat(request: Request) -> Response | ASGIApp:
    """POST /v1/chat/completions"""
    service, asked = service_of(request), await read(request, ChatRequest)
    bridge = service.free_model(asked.model)
    for tool in asked.tools or ():
        check_depth(tool.function.parameters, service.settings.max_schema_depth, "tools")
    tools = usable_tools(asked.tools, asked.tool_choice)
    messages = turns(asked.messages, tools, strict=service.settings.strict_roles)
    ids = await encode_messages(service, messages)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", code="invalid_value", param="top_logprobs")
    params = service.params(
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        prompts=[ids],
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        constraint=_constraint(service, asked, tools),
        **_sampling(asked),
    )
    job = await bridge.submit([ids], params)
    note(request, job, messages)
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    shape = ChatShape(job, _name(service, asked.model), bridge.tokenizer, with_usage, tools=bool(tools))
    if asked.stream:
        return EventStream(bridge, job, shape)
    return JsonResponse(shape.whole(await whole(bridge, job, request.receive)))


async def completions(request: Request) -> Response | ASGIApp:
    """POST /v1/completions"""
    service, asked = service_of(request), await read(request, CompletionRequest)
    bridge = service.free_model(asked.model)
    _check_completion(asked)
    texts = _several(asked.prompt)
    if len(texts) > service.settings.max_prompts:
        said = f"prompt: at most {service.settings.max_prompts} at a time"
        raise ApiError(400, said, code="invalid_value", param="prompt")
    prompts = [await service.encode_text(text, "prompt") for text in texts]
    params = service.params(
        max_tokens=asked.max_tokens or 16,  # what OpenAI takes where nothing is said
        prompts=prompts,
        logprobs=asked.logprobs,
        constraint=_constraint(service, asked),
        **_sampling(asked),
    )
    job = await bridge.submit(prompts, params)
    note(request, job, texts)
    echoed = [t if isinstance(t, str) else bridge.tokenizer.decode(t) for t in texts] if asked.echo else ()
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    shape = TextShape(job, _name(service, asked.model), bridge.tokenizer, with_usage, echoed=echoed)
    if asked.stream:
        return EventStream(bridge, job, shape)
    return JsonResponse(shape.whole(await whole(bridge, job, request.receive)))


async def models(request: Request) -> Response:
    """GET /v1/models"""
    service = service_of(request)
    return JsonResponse({"object": "list", "data": [_card(service, name) for name in service.settings.names]})


async def model(request: Request) -> Response:
    """GET /v1/models/{name}"""
    service, name = service_of(request), request.path_params["name"]
    service.model(name)
    return JsonResponse(_card(service, name))


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: the mean of the last hidden states of a text."""
    service, asked = service_of(request), await read(request, EmbeddingRequest)
    bridge = service.free_model(asked.model)
    size = bridge.lm.config.hidden_size
    if asked.dimensions not in (None, size):
        raise ApiError(400, f"dimensions: this model has {size}", code="invalid_value", param="dimensions")
    texts = _several(asked.input)
    if len(texts) > service.settings.max_prompts or not texts:
        said = f"input: 1 to {service.settings.max_prompts} texts at a time"
        raise ApiError(400, said, code="invalid_value", param="input")
    prompts = [await service.encode_text(text, "input") for text in texts]
    vectors = await unless_gone(request.receive, _embedded(bridge, prompts))
    service.metrics.prompt_tokens.add(sum(map(len, prompts)))
    binary = asked.encoding_format == "base64"
    data = [{"object": "embedding", "index": i, "embedding": _vector(v, binary)} for i, v in enumerate(vectors)]
    tokens = sum(map(len, prompts))
    counted = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonResponse({"object": "list", "data": data, "model": _name(service, asked.model), "usage": counted})


async def _embedded(bridge: Bridge, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    return [await bridge.call(partial(embed, bridge.lm, ids)) for ids in prompts]


@torch.inference_mode()
def embed(lm: LM, ids: Sequence[int]) -> list[float]:
    """The mean over a text's positions, BOS among them, of what the head would see: float32 [hidden]."""
    hidden = lm.model.hidden(torch.tensor([list(ids)], device=lm.model.device))
    out: list[float] = hidden[0].float().mean(0).tolist()
    return out


async def tokenize(request: Request) -> Response:
    """POST /tokenize"""
    service, asked = service_of(request), await read(request, TokenizeRequest)
    bridge = service.model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "either prompt or messages", code="invalid_value", param="prompt")
    if asked.messages is not None:
        messages = turns(asked.messages, strict=service.settings.strict_roles)
        ids = await bridge.text(lambda: encode_chat(bridge.tokenizer, messages))
    else:
        text, bos = asked.prompt or "", asked.add_special_tokens
        ids = await bridge.text(lambda: bridge.tokenizer.encode(text, bos=bos))
    return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": bridge.longest})


async def detokenize(request: Request) -> Response:
    """POST /detokenize"""
    service, asked = service_of(request), await read(request, DetokenizeRequest)
    bridge = service.model(asked.model)
    if any(i >= bridge.lm.config.vocab_size for i in asked.tokens):
        said = f"tokens: ids end at {bridge.lm.config.vocab_size - 1}"
        raise ApiError(400, said, code="invalid_value", param="tokens")
    text = await bridge.text(lambda: bridge.tokenizer.decode(asked.tokens, skip_control=asked.skip_special_tokens))
    return JsonResponse({"prompt": text})


async def encode_messages(service: Service, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the answer begins."""
    tokenizer = service.model().tokenizer
    characters = sum(len(message["content"]) for message in messages)
    return await service.encode(lambda: encode_chat(tokenizer, messages), characters, "messages")


def _sampling(asked: Common) -> dict[str, Any]:
    """The fields of `SamplingParams` that requests share, OpenAI's defaults filled in."""
    return {
        "n": asked.n or 1,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "top_p": asked.top_p or 1.0,
        "top_k": asked.top_k or 0,
        "min_p": asked.min_p or 0.0,
        "repetition_penalty": asked.repetition_penalty or 1.0,
        "presence_penalty": asked.presence_penalty or 0.0,
        "frequency_penalty": asked.frequency_penalty or 0.0,
        "logit_bias": {int(token): value for token, value in (asked.logit_bias or {}).items()},
        "stop": asked.stops,
        "seed": None if asked.seed is None else asked.seed % 2**63,
    }


def _constraint(service: Service, asked: Common, tools: Sequence[Any] = ()) -> Constraint | None:
    """What the answer has to look like. Raises `ApiError` for two demands, and for one that cannot be read."""
    wanted: list[Constraint] = []
    deepest = service.settings.max_schema_depth
    try:
        if asked.regex is not None:
            wanted.append(Constraint(regex=asked.regex))
        if asked.choice is not None:
            wanted.append(Constraint(choice=tuple(asked.choice)))
        if isinstance(asked, ChatRequest):
            if asked.response_format and asked.response_format.type != "text":
                wanted.append(_json(asked, deepest))
            if tools:
                or_text = asked.tool_choice in (None, "auto")
                wanted.append(call_constraint(tools, or_text=or_text))
    except CabochonError as error:
        raise ApiError(422, spoken(error), code="unusable_constraint") from None
    if len(wanted) > 1:
        said = "response_format, regex, choice and tools: one of them at a time"
        raise ApiError(400, said, code="invalid_value")
    return wanted[0] if wanted else None


def _json(asked: ChatRequest, deepest: int) -> Constraint:
    wanted = asked.response_format
    assert wanted is not None
    schema = wanted.value
    if wanted.type == "json_object" and schema is None:
        return Constraint.json()
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            said = "response_format.json_schema: it is missing"
            raise ApiError(400, said, code="invalid_value", param="response_format.json_schema")
        schema = wanted.json_schema.schema_
    check_depth(schema, deepest, "response_format")
    return Constraint.json(schema)


def check_depth(schema: Any, deepest: int, param: str) -> None:
    """Raise `ApiError` for a schema of too many levels."""
    level = [schema]
    for _ in range(deepest):
        level = [c for v in level for c in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
        if not level:
            return
    raise ApiError(422, f"{param}: a schema has more than {deepest} levels", code="unusable_constraint", param=param)


def _check_completion(asked: CompletionRequest) -> None:
    if asked.best_of not in (None, 1, asked.n or 1):
        raise ApiError(400, "best_of: it has to be n; answers are not ranked", code="invalid_value", param="best_of")
    if asked.suffix:
        raise ApiError(400, "suffix: this model continues texts only", code="invalid_value", param="suffix")
    if asked.echo and asked.logprobs is not None:
        said = "echo: not together with logprobs, which there are for answers only"
        raise ApiError(400, said, code="invalid_value", param="echo")


def _several(given: Any) -> list[Any]:
    """One text or list of ids as a list of one; several as they are."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise ApiError(400, "the list of prompts is empty", code="invalid_value")
    return list(given)


def _name(service: Service, asked: str | None) -> str:
    return asked or service.settings.names[0]


def _card(service: Service, name: str) -> dict[str, Any]:
    longest = service.model().longest
    return {
        "id": name, "object": "model", "created": service.started, "owned_by": "cabochon", "max_model_len": longest,
    }  # fmt: skip


def _vector(vector: Sequence[float], binary: bool) -> Any:
    import numpy as np

    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode() if binary else vector
