"""Errors as OpenAI's interface words them. They never hold a path, a traceback or what a client wrote."""

from dataclasses import dataclass, field
from typing import Any

INVALID = "invalid_request_error"
SERVER = "server_error"
NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients would ask again by themselves, which cannot help here


@dataclass
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: for people, in one or two sentences.
        type: of OpenAI's few kinds.
        param: the field at fault, or None.
        code: for programs, or None.
        headers: of the answer.
    """

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Returns what the answer holds."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """Returns the error of a field that cannot be."""
    return ApiError(400, message, INVALID, param, code)


def unavailable(message: str, retry_after: int) -> ApiError:
    """Returns the error of a server that is going to stop."""
    return ApiError(503, message, SERVER, None, "server_shutting_down", {"Retry-After": str(retry_after)})


def busy(retry_after: int) -> ApiError:
    """Returns the error of a full queue."""
    message = f"Too many pictures are waiting. Try again in {retry_after} s."
    return ApiError(429, message, "rate_limit_error", None, "rate_limit_exceeded", {"Retry-After": str(retry_after)})


def too_slow(seconds: float) -> ApiError:
    """Returns the error of a request whose time is up."""
    return ApiError(504, f"The pictures were not finished within {seconds:g} s.", SERVER, None, "timeout", NO_RETRY)


def internal(number: str) -> ApiError:
    """Returns the error that nobody foresaw; `number` finds its line in the log."""
    return ApiError(500, f"The server failed. Its log names this failure {number}.", SERVER, None, "internal_error")


OF_STATUS = {
    404: ("There is nothing at this address.", "not_found"),
    405: ("This address does not take this method.", "method_not_allowed"),
}


def of_status(status: int) -> ApiError:
    """Returns the error of an HTTP status that the framework chose."""
    message, code = OF_STATUS.get(status, ("The request cannot be answered.", "http_error"))
    return ApiError(status, message, INVALID if status < 500 else SERVER, None, code)
