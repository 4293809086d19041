"""Asking a server whether it lives."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker/healthcheck.py"


class Answers(BaseHTTPRequestHandler):
    """Answers /CODE with that status."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/") or 200))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def check(**variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in ("SANA_HEALTH_URL", "DEMO_PORT")}
    words = [sys.executable, "-S", str(SCRIPT)]
    return subprocess.run(words, env=environment | variables, capture_output=True, check=False).returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (401, 0), (404, 0), (500, 1), (503, 1)])
def test_an_answer(port: int, status: int, code: int) -> None:
    assert check(SANA_HEALTH_URL=f"http://127.0.0.1:{port}/{status}") == code


def test_the_page_of_the_web_app_is_asked_without_a_proxy(port: int) -> None:
    assert check(DEMO_PORT=str(port), http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9") == 0


def test_nobody_there() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.server_close()
    assert check(DEMO_PORT=str(server.server_port)) == 1
