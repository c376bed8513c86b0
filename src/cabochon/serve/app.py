"""The routes, and what is around them."""

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cabochon.serve import openai, pages, tgi, vertex
from cabochon.serve.errors import ApiError, unavailable
from cabochon.serve.guard import Guard
from cabochon.serve.metrics import CONTENT_TYPE
from cabochon.serve.openapi import document
from cabochon.serve.service import Service
from cabochon.serve.settings import ServeSettings
from cabochon.serve.wire import JsonResponse


def routes(settings: ServeSettings) -> list[Route]:
    """Every route of a server with these settings."""
    found = []  # what the settings name comes first: it may take the place of another
    if settings.health_route:
        found.append(Route(settings.health_route, ready, methods=["GET"]))
    if settings.predict_route:
        found.append(Route(settings.predict_route, vertex.predict, methods=["POST"]))
    return [
        *found,
        Route("/", pages.page, methods=["GET"]),
        Route("/static/{path:path}", pages.page, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/v1/models", openai.models, methods=["GET"]),
        Route("/v1/models/{name:path}", openai.model, methods=["GET"]),
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/embeddings", openai.embeddings, methods=["POST"]),
        Route("/tokenize", openai.tokenize, methods=["POST"]),
        Route("/detokenize", openai.detokenize, methods=["POST"]),
        Route("/generate", tgi.generate, methods=["POST"]),
        Route("/generate_stream", tgi.generate_stream, methods=["POST"]),
        Route("/info", tgi.info, methods=["GET"]),
    ]


def make_app(service: Service) -> Starlette:
    """The application of a service. The model may be loaded later: until then it says 503."""
    app = surrounded(routes(service.settings), service)
    app.state.service, app.state.files = service, pages.load()
    app.state.document = orjson.dumps(document(service.settings))
    return app


def surrounded(routes: list[Route], service: Service) -> Starlette:
    """An application of these routes, with what every request passes first."""
    settings, middleware = service.settings, []
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type", "x-request-id"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    middleware.append(Middleware(Guard, service=service))
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _rerouted})
    app.router.redirect_slashes = False
    return app


async def health(request: Request) -> Response:
    """GET /health: whether the process works. 503 when the engine cannot go on."""
    bridge = openai.service_of(request).bridge
    if bridge and bridge.dead:
        raise unavailable("the engine has stopped", "engine_dead")
    return JsonResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """GET /ready: whether requests are taken on."""
    bridge = openai.service_of(request).model()
    if bridge.draining:
        raise unavailable("the server is ending", "draining")
    if bridge.dead:
        raise unavailable("the engine has stopped", "engine_dead")
    return JsonResponse({"status": "ready"})


async def metrics(request: Request) -> Response:
    """GET /metrics"""
    return Response(openai.service_of(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


async def openapi(request: Request) -> Response:
    """GET /openapi.json"""
    content: bytes = request.app.state.document
    return Response(content, media_type="application/json")


def _rerouted(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    failed = ApiError(error.status_code, error.detail, code=code)
    return JsonResponse(failed.body, status_code=error.status_code, headers=error.headers)
