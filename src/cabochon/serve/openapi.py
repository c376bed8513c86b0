"""The OpenAPI document: fields from the models that requests are read with, so that the two cannot disagree."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cabochon.base.version import package_version
from cabochon.serve.fields import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from cabochon.serve.settings import ServeSettings
from cabochon.serve.tgi import GenerateRequest
from cabochon.serve.vertex import PredictRequest

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_TGI_ERROR = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
}
_REASONS = {
    400: "The request cannot be answered as it is.",
    401: "No API key, or one that is not known.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "The server does not answer under that name.",
    422: "The schema or the expression cannot be used.",
    429: "Too many requests are waiting.",
    503: "The model is being loaded, the server is ending, or the answer took too long.",
}
_POST: dict[str, tuple[str, type[BaseModel], bool]] = {  # path: summary, fields, whether it can stream
    "/v1/chat/completions": ("Answer a conversation.", ChatRequest, True),
    "/v1/completions": ("Continue a text.", CompletionRequest, True),
    "/v1/embeddings": ("The mean of the last hidden states.", EmbeddingRequest, False),
    "/tokenize": ("Token ids of a text or a conversation.", TokenizeRequest, False),
    "/detokenize": ("The text of token ids.", DetokenizeRequest, False),
    "/generate": ("Continue a text, as text-generation-inference does.", GenerateRequest, True),
    "/generate_stream": ("The same, as events.", GenerateRequest, True),
    "predict": ("Several answers, as Vertex AI asks for them.", PredictRequest, False),  # at a path of its choice
}
_GET = {  # path: summary, type of what comes back, whether a key is needed
    "/health": ("Whether the process works.", "application/json", False),
    "/ready": ("Whether requests are taken on.", "application/json", False),
    "/metrics": ("Figures for Prometheus.", "text/plain", True),
    "/info": ("The model and its limits, as text-generation-inference puts it.", "application/json", True),
    "/v1/models": ("The models.", "application/json", True),
    "/openapi.json": ("This document.", "application/json", True),
}


def document(settings: ServeSettings) -> dict[str, Any]:
    """The document of a server with these settings."""
    kinds = sorted({kind for _, kind, _ in _POST.values()}, key=lambda kind: kind.__name__)
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {path: {"post": _post(path)} for path in _POST if path != "predict"}
    paths |= {path: {"get": _get(path)} for path in _GET}
    if settings.health_route:
        paths[settings.health_route] = {"get": {**_get("/ready"), "operationId": "health_route"}}
    if settings.predict_route:
        paths[settings.predict_route] = {"post": {**_post("predict"), "operationId": "predict"}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"] = {
        "get": {**_get("/v1/models"), "summary": "One model.", "parameters": [name], "operationId": "model"}
    }
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "cabochon", "version": package_version()},
        "paths": paths,
        "components": components,
    }
    if settings.key_hashes:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _post(path: str) -> dict[str, Any]:
    summary, kind, streams = _POST[path]
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"description": "Server-sent events, whose data is JSON."}}
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "The answer.", "content": content}, **_errors(path, list(_REASONS))},
    }


def _get(path: str) -> dict[str, Any]:
    summary, media_type, needs_key = _GET[path]
    schema = {"type": "object"} if media_type == "application/json" else {"type": "string"}
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_").replace(".", "_"),
        "responses": {
            "200": {"description": "As said.", "content": {media_type: {"schema": schema}}},
            **_errors(path, [401, 404, 421, 503]),
        },
    }
    if not needs_key:
        operation["security"] = []
    return operation


def _errors(path: str, statuses: list[int]) -> dict[str, Any]:
    schema = _TGI_ERROR if path in ("/generate", "/generate_stream", "/info") else _ERROR
    content = {"application/json": {"schema": schema}}
    return {str(status): {"description": _REASONS[status], "content": content} for status in statuses}
