"""What a request that fails is told, in OpenAI's shape: {"error": {message, type, param, code}}."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cabochon.base.errors import CabochonError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request ends with this status. `param` is the field at fault, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What is sent as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unavailable(message: str, code: str, after: int = 5) -> ApiError:
    """503: not now, and perhaps in a moment."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(after)})


def api_error(error: Exception) -> ApiError:
    """The answer to any exception: ours are what the user did, all others are bugs and say nothing of themselves."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return invalid(error)
    if isinstance(error, CabochonError):
        return ApiError(400, spoken(error), code="invalid_value")
    return ApiError(500, "the server made a mistake; its log says more", code="internal_error")


def spoken(error: CabochonError) -> str:
    """An error of ours as one line."""
    return f"{error.what}: {error.cause}; {error.hint}"


def invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request's fields."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = field_path(first["loc"])
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    said = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"]
    return ApiError(400, f"{param}: {said}" if param else said, code=code, param=param)


def field_path(steps: Sequence[int | str]) -> str | None:
    """`messages[0].content` for ("messages", 0, "content"). Names of alternative types are left out."""
    path = ""
    for step in steps:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int", "float", "dict"):
            path += f".{step}" if path else step
    return path[:120] or None
