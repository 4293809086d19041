"""Reading bodies: size, time, kind, clients that go away."""

import asyncio

import pytest

from sana.serving.body import ClientGoneError, read_body, until_gone
from sana.serving.errors import ApiError

JSON = {"content-type": "application/json; charset=utf-8"}


def receiving(*messages):
    """Returns ASGI's receive; after the last message nothing comes any more."""
    left = list(messages)

    async def receive():
        if left:
            return left.pop(0)
        await asyncio.Event().wait()

    return receive


def part(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


def read(receive, headers=None, limit=10, seconds=60.0):
    return asyncio.run(read_body(receive, JSON | (headers or {}), limit=limit, seconds=seconds))


def test_parts_are_joined():
    assert read(receiving(part(b"{"), part(b""), part(b"}", more=False))) == b"{}"


def test_a_body_may_be_as_long_as_the_limit():
    assert len(read(receiving(part(b"x" * 10, more=False)))) == 10


@pytest.mark.parametrize("headers", [{}, {"content-length": "3"}, {"content-length": "-5"}, {"content-length": "²"}])
def test_bytes_are_counted_whatever_the_headers_say(headers):
    with pytest.raises(ApiError) as caught:
        read(receiving(*[part(b"xxxx")] * 3, part(b"", more=False)), headers)
    assert caught.value.status == 413 and caught.value.headers["Connection"] == "close"


def test_an_announced_length_is_refused_before_anything_is_read():
    with pytest.raises(ApiError) as caught:
        read(receiving(), {"content-length": "9" * 400})
    assert caught.value.status == 413


def test_a_body_that_never_ends_is_not_drained_for_ever():
    with pytest.raises(ApiError) as caught:
        read(receiving(*[part(b"xxxx")] * 41))
    assert caught.value.status == 413


def test_a_body_that_does_not_come_is_given_up():
    with pytest.raises(ApiError) as caught:
        read(receiving(part(b"{")), seconds=0.01)
    assert caught.value.status == 408


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", "application/jsonp"])
def test_only_json_is_read(kind):
    with pytest.raises(ApiError) as caught:
        read(receiving(part(b"{}", more=False)), {"content-type": kind})
    assert caught.value.status == 415


def test_a_client_that_leaves_in_the_middle():
    with pytest.raises(ClientGoneError):
        read(receiving(part(b"{"), {"type": "http.disconnect"}))
    asyncio.run(until_gone(receiving(part(b""), {"type": "http.disconnect"})))
