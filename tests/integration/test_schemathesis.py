"""5,000 cases that schemathesis makes from our own OpenAPI document, valid ones and broken ones."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.transport import Response

from cabochon.lm import LM
from cabochon.serve.app import routes
from cabochon.serve.settings import ServeSettings
from servers import CHAT, asks, running

# How many of each. Making them up takes most of the time: a conversation twenty times as long as a few token ids.
CASES = {
    CHAT: 250, "/v1/completions": 900, "/v1/embeddings": 1000, "/tokenize": 150, "/detokenize": 900, "/generate": 800,
    "/generate_stream": 800, "/predict": 300, "/v1/models/{name}": 150,
}  # fmt: skip
ROUNDS = 10  # Hypothesis ends a search early when it has gone stale; another one starts elsewhere
SLOW, TRIES = 2.0, 3  # seconds; a machine that was busy at that moment is asked again
load_all_checks()
# What a document cannot say: a prompt has to fit the context, an expression has to be one, ...
UNSAID = [check for check in CHECKS.get_all() if check.__name__ == "positive_data_acceptance"]
ROUTES = {"predict_route": "/predict", "health_route": "/probe"}


@pytest.mark.slow
def test_every_answer_is_as_described(lm: LM) -> None:
    asked = 0
    with running(lm, max_new_tokens=4, **ROUTES) as server, server.client() as client:
        document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in document.get_all_operations()]
        assert {operation.path for operation in operations} >= {*CASES, "/probe"}
        for operation in operations:
            cases = CASES.get(operation.path, 1)  # of the others, which take no argument, there is only one
            statuses = answered(operation, cases)
            assert max(statuses) < 500
            assert statuses.total() >= cases, operation.label
            if operation.path not in ("/predict", "/v1/models/{name}"):
                assert 200 in statuses, operation.label  # some of them were understood
            got = client.post(CHAT, json=asks("What is 2+3?", max_tokens=4))
            assert got.json()["choices"][0]["message"]["content"] == "ones: 2"
            assert not server.bridge.pending
            asked += statuses.total()
        described = {operation.path for operation in operations} | {"/", "/static/{path:path}", "/openapi.json"}
        assert {route.path.replace("{name:path}", "{name}") for route in routes(ServeSettings(**ROUTES))} <= described
    assert asked >= 5000


def answered(operation: schemathesis.APIOperation, cases: int) -> Counter[int]:
    """The statuses of so many cases, each of them checked against the document."""
    statuses = Counter[int]()
    made = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if operation.method == "post":
        made |= operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    def run(case: schemathesis.Case) -> None:
        response = soon(case)
        statuses[response.status_code] += 1
        case.validate_response(response, excluded_checks=UNSAID)

    for _ in range(ROUNDS):
        if statuses.total() < cases:
            settings(
                max_examples=cases - statuses.total(),
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=[*HealthCheck],
            )(given(made)(run))()
    return statuses


def soon(case: schemathesis.Case) -> Response:
    """The answer, which does not take long each time."""
    for _ in range(TRIES):
        response = case.call()
        if response.elapsed < SLOW:
            return response
    raise AssertionError(f"{case.method} {case.path} took {response.elapsed} s")
