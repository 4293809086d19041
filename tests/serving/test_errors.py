"""Errors in OpenAI's form."""

import pytest

from sana.serving import errors


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.invalid("n", "n is wrong."), 400, "invalid_value"), (errors.busy(7), 429, "rate_limit_exceeded"),
        (errors.unavailable("Ends.", 3), 503, "server_shutting_down"), (errors.too_slow(2.5), 504, "timeout"),
        (errors.internal("ab12"), 500, "internal_error"), (errors.of_status(404), 404, "not_found"),
        (errors.of_status(405), 405, "method_not_allowed"), (errors.of_status(418), 418, "http_error"),
    ],
)  # fmt: skip
def test_shape(error, status, code):
    body = error.body()["error"]
    assert error.status == status and body["code"] == code and set(body) == {"message", "type", "param", "code"}
    assert body["type"] == ("rate_limit_error" if status == 429 else
                            "invalid_request_error" if status < 500 else "server_error")  # fmt: skip


def test_times_to_wait_are_in_headers():
    assert errors.busy(7).headers["Retry-After"] == "7" and errors.unavailable("x", 3).headers["Retry-After"] == "3"
    assert errors.too_slow(1).headers["x-should-retry"] == "false"
