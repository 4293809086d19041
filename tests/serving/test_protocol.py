"""Slow clients on real sockets: heads that never end, bodies nobody reads, answers nobody takes; what is no HTTP."""

import json
import socket
import threading
from contextlib import contextmanager

import pytest
import uvicorn

from sana.serving.protocol import guarded_protocol
from sana.serving.server import HEAD_BYTES, listen

PATIENCE = 60  # seconds after which a connection that should have been cut fails the test


async def app(scope, receive, send):
    """Answers at once, without reading; /large with more than any socket's buffer holds."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000 if scope["path"] == "/large" else 0):
        await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
    await send({"type": "http.response.body", "body": b"done"})


@contextmanager
def serving(on_lost=lambda: None, limit=None, **seconds):
    class Watched(guarded_protocol(**{"header_seconds": 30.0, "write_seconds": 30.0, **seconds})):
        def connection_lost(self, exc):
            super().connection_lost(exc)
            on_lost()

    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        app,
        http=Watched,
        lifespan="off",
        log_config=None,
        log_level="critical",
        ws="none",
        timeout_keep_alive=PATIENCE,
        limit_concurrency=limit,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def connected(address):
    with socket.create_connection(address, timeout=PATIENCE) as client:
        yield client


def read_all(client):
    """Returns everything up to the end of the connection, however it ends."""
    found = bytearray()
    try:
        while chunk := client.recv(2**16):
            found += chunk
    except ConnectionResetError:
        return bytes(found)
    return bytes(found)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow:"])
def test_a_head_that_does_not_end_is_cut_off(sent):
    with serving(header_seconds=0.2) as address, connected(address) as client:
        client.sendall(sent)
        assert read_all(client) == b""


def test_a_second_head_has_the_same_limit():
    with serving(header_seconds=0.2) as address, connected(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = client.recv(2**16)
        while not answer.endswith(b"0\r\n\r\n"):
            answer += client.recv(2**16)
        client.sendall(b"GET / HT")
        assert read_all(client) == b""


def test_a_body_that_nobody_reads_does_not_keep_a_connection():
    with serving(header_seconds=0.2) as address, connected(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nxxx")
        answer = client.recv(2**16)
        while not answer.endswith(b"0\r\n\r\n"):
            answer += client.recv(2**16)
        client.sendall(b"xxx")
        assert answer.startswith(b"HTTP/1.1 200") and read_all(client) == b""


def test_pipelined_requests_are_answered():
    with serving(header_seconds=5) as address, connected(address) as client:
        head = b"GET / HTTP/1.1\r\nHost: x\r\n"
        client.sendall((head + b"\r\n") * 3 + head + b"Connection: close\r\n\r\n")
        assert read_all(client).count(b"done") == 4


def test_an_answer_that_nobody_takes_is_cut_off():
    lost = threading.Event()
    with serving(write_seconds=0.2, on_lost=lost.set) as address, connected(address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert lost.wait(PATIENCE), "the server kept the connection of a client that takes nothing"


def test_an_answer_that_is_taken_slowly_but_steadily_arrives():
    with serving(write_seconds=20) as address, connected(address) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert len(read_all(client)) > 1000 * 2**16


def error_in(answer):
    """Returns status and error of an answer in OpenAI's form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower() and b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


@pytest.mark.parametrize(
    "sent",
    [
        b"no http\r\n\r\n",
        b"GET / HTTP/x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 2 * HEAD_BYTES,
    ],
)
def test_what_is_no_http_gets_an_error_of_openais_form(sent):
    with serving() as address, connected(address) as client:
        client.sendall(sent)
        status, error = error_in(read_all(client))
        assert status == 400 and error["code"] == "invalid_http" and error["type"] == "invalid_request_error"


def test_a_broken_body_after_the_answer_ends_the_connection_and_nothing_else():
    with serving() as address, connected(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        answer = client.recv(2**16)
        while not answer.endswith(b"0\r\n\r\n"):
            answer += client.recv(2**16)
        client.sendall(b"no size\r\n")
        assert read_all(client) == b""
        with connected(address) as second:
            second.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"done" in read_all(second)


def test_too_many_connections_get_an_error_of_openais_form_and_places_come_free():
    asked = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    lost = threading.Semaphore(0)
    with serving(limit=3, on_lost=lost.release) as address:
        with connected(address) as first, connected(address) as second:
            for other in (first, second):
                other.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert other.recv(2**16).startswith(b"HTTP/1.1 200")
            with connected(address) as third:
                third.sendall(asked)
                answer = read_all(third)
            assert error_in(answer)[0] == 503 and b"retry-after: 1\r\n" in answer
        for _ in range(3):
            assert lost.acquire(timeout=PATIENCE)
        with connected(address) as client:
            client.sendall(asked)
            assert b"done" in read_all(client)
