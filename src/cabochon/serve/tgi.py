"""The routes of text-generation-inference, thin: /generate, /generate_stream, /info."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from cabochon.base.errors import CabochonError
from cabochon.generate.grammar import Constraint
from cabochon.serve.bridge import Bridge
from cabochon.serve.errors import ApiError, invalid, spoken
from cabochon.serve.fields import Lenient, StopText, Strict, Text
from cabochon.serve.job import Job, Piece
from cabochon.serve.openai import check_depth, service_of
from cabochon.serve.service import Service
from cabochon.serve.shapes import finite
from cabochon.serve.wire import EventStream, JsonResponse, event, note, read, whole

_REASONS = {"stop": "eos_token", "length": "length"}


class Grammar(Strict):
    """What the answer has to look like."""

    type: Literal["json", "json_schema", "regex"]
    value: Any


class Parameters(Lenient):
    """What steers an answer. Fields that are not here have no effect, as there."""

    max_new_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[StopText], Field(max_length=16)] | None = None
    return_full_text: bool | None = None
    details: bool = False
    grammar: Grammar | None = None


class GenerateRequest(Lenient):
    """POST /generate and /generate_stream"""

    inputs: Text
    parameters: Parameters = Parameters()
    stream: bool = False


async def generate(request: Request) -> Response | ASGIApp:
    """POST /generate"""
    service, asked = service_of(request), await _read(request)
    bridge, job = await _submit(request, service, asked)
    if asked.stream:
        return EventStream(bridge, job, _TokenEvents(bridge, job, asked))
    row = (await whole(bridge, job, request.receive))[0]
    text = (asked.inputs if asked.parameters.return_full_text else "") + row.text
    content: dict[str, Any] = {"generated_text": text}
    if asked.parameters.details:
        content["details"] = {
            **_details(row.finish_reason, asked.parameters.seed, len(row.pieces)),
            "prefill": [],
            "tokens": [_token(bridge, piece) for piece in row.pieces],
        }
    return JsonResponse(content)


async def generate_stream(request: Request) -> Response | ASGIApp:
    """POST /generate_stream"""
    service, asked = service_of(request), await _read(request)
    bridge, job = await _submit(request, service, asked)
    return EventStream(bridge, job, _TokenEvents(bridge, job, asked))


async def info(request: Request) -> Response:
    """GET /info"""
    service = service_of(request)
    bridge = service.model()
    return JsonResponse(
        {
            "model_id": service.settings.names[0],
            "model_dtype": str(bridge.lm.model.cache_dtype).removeprefix("torch."),
            "model_device_type": bridge.lm.model.device.type,
            "max_concurrent_requests": bridge.capacity,
            "max_best_of": 1,
            "max_stop_sequences": 16,
            "max_input_tokens": bridge.longest - 1,
            "max_total_tokens": bridge.longest,
            "router": "cabochon",
            "version": service.version,
        }
    )


async def _read(request: Request) -> GenerateRequest:
    try:
        return await read(request, GenerateRequest)
    except ValidationError as error:
        failed = invalid(error)
        raise ApiError(422, failed.message, code=failed.code, param=failed.param) from None


async def _submit(request: Request, service: Service, asked: GenerateRequest) -> tuple[Bridge, Job]:
    bridge, wanted = service.free_model(), asked.parameters
    if not asked.inputs:
        raise ApiError(422, "inputs: it is empty", code="invalid_value", param="inputs")
    prompts = [await service.encode_text(asked.inputs, "inputs")]
    drawn = wanted.do_sample or any(v is not None for v in (wanted.temperature, wanted.top_k, wanted.top_p))
    params = service.params(
        max_tokens=wanted.max_new_tokens or 100,
        prompts=prompts,
        temperature=(1.0 if wanted.temperature is None else wanted.temperature) if drawn else 0.0,
        top_k=wanted.top_k or 0,
        top_p=wanted.top_p or 1.0,
        repetition_penalty=wanted.repetition_penalty or 1.0,
        frequency_penalty=wanted.frequency_penalty or 0.0,
        seed=wanted.seed,
        stop=tuple(wanted.stop or ()),
        logprobs=0,
        constraint=_constraint(wanted.grammar, service.settings.max_schema_depth),
    )
    job = await bridge.submit(prompts, params)
    note(request, job, asked.inputs)
    return bridge, job


def _constraint(grammar: Grammar | None, deepest: int) -> Constraint | None:
    if grammar is None:
        return None
    try:
        if grammar.type == "regex":
            if not isinstance(grammar.value, str):
                raise ApiError(422, "grammar: an expression is a text", code="invalid_value", param="grammar")
            return Constraint(regex=grammar.value)
        schema = orjson.loads(grammar.value) if isinstance(grammar.value, str) else grammar.value
        check_depth(schema, deepest, "grammar")
        return Constraint(json_schema=orjson.dumps(schema).decode())
    except (CabochonError, orjson.JSONDecodeError, orjson.JSONEncodeError) as error:
        said = spoken(error) if isinstance(error, CabochonError) else str(error)
        raise ApiError(422, f"grammar: {said}", code="unusable_constraint", param="grammar") from None


class _TokenEvents:
    """A stream of tokens; the last one brings the whole text."""

    def __init__(self, bridge: Bridge, job: Job, asked: GenerateRequest) -> None:
        self._bridge, self._job, self._asked = bridge, job, asked
        self._texts: list[str] = [asked.inputs] if asked.parameters.return_full_text else []
        self._count = 0

    def begin(self) -> bytes:
        return b""

    def take(self, pieces: Sequence[Piece]) -> bytes:
        return b"".join(map(self._one, pieces))

    def end(self) -> bytes:
        return b""

    def fail(self, error: ApiError) -> bytes:
        return event({"error": error.message, "error_type": "generation"})

    def _one(self, piece: Piece) -> bytes:
        self._count += 1
        self._texts.append(piece.text)
        content: dict[str, Any] = {"index": self._count, "token": _token(self._bridge, piece)}
        content |= {"generated_text": None, "details": None}
        if piece.finish_reason:
            content["generated_text"] = "".join(self._texts)
            content["details"] = {
                **_details(piece.finish_reason, self._asked.parameters.seed, self._count),
                "input_length": self._job.prompt_tokens,
            }
        return event(content)


def _details(reason: str, seed: int | None, tokens: int) -> dict[str, Any]:
    return {"finish_reason": _REASONS[reason], "generated_tokens": tokens, "seed": seed}


def _token(bridge: Bridge, piece: Piece) -> dict[str, Any]:
    special = piece.token in bridge.tokenizer.control_ids
    text = bridge.tokenizer.decode([piece.token], skip_control=False) if special else piece.text
    logprob = finite(piece.logprob.logprob) if piece.logprob else 0.0
    return {"id": piece.token, "text": text, "logprob": logprob, "special": special}
