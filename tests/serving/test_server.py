"""The server on loopback, asked by OpenAI's own client; clients that leave; the end of a server."""

import base64
import contextlib
import io
import json
import queue
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from sana.serving.server import Server, address, listen
from sana.serving.settings import ServerSettings

WAIT = 120


class Running:
    """A server in a thread of this process."""

    def __init__(self, pipeline, **options):
        self.server = Server(pipeline, ServerSettings(port=0, **{"max_steps": 10_000, **options}))
        self.codes = queue.Queue()
        ready = queue.Queue()
        self.thread = threading.Thread(target=lambda: self.codes.put(self.server.run(ready.put)))
        self.thread.start()
        self.url = ready.get(timeout=WAIT)

    @property
    def stats(self):
        return self.server.engine.stats()

    def client(self, key="none", **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": WAIT, **options})

    def until(self, condition):
        """Waits for what the engine is going to do, and asks it again and again."""
        end = time.monotonic() + WAIT
        while not condition(self.stats):
            assert self.server.engine.alive and time.monotonic() < end
            httpx.get(f"{self.url}/health/live")

    def end(self):
        self.server.stop()
        self.thread.join(WAIT)
        return self.codes.get(timeout=1)


@contextmanager
def running(pipeline, **options):
    made = Running(pipeline, **options)
    try:
        yield made
    finally:
        made.server.stop()
        made.thread.join(WAIT)


@pytest.fixture(scope="module")
def site(small):
    with running(small) as made:
        yield made


def as_array(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def streamed(site, **content):
    """Returns an open stream of events, after its first step was told."""
    body = {"prompt": "a cat", "stream": True, "steps": 10_000, **content}
    return httpx.stream("POST", f"{site.url}/v1/images/generations", json=body, timeout=WAIT)


def events(response):
    return (json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: "))


def test_openais_client_makes_pictures(site, small):
    answer = site.client().images.generate(
        prompt="a cat", n=2, size="64x96", extra_body={"seed": 5, "steps": 2, "guidance": 3.0}
    )
    offline = small("a cat", 96, 64, num_inference_steps=2, seed=5, num_images_per_prompt=2, guidance_scale=3.0,
                    output_type="pil")  # fmt: skip
    assert answer.created > 0 and answer.size == "64x96" and [one.seed for one in answer.data] == [5, 6]
    for datum, expected in zip(answer.data, offline, strict=True):
        assert np.array_equal(as_array(datum.b64_json), np.asarray(expected))


def test_openais_client_fetches_by_address(site):
    answer = site.client().images.generate(prompt="a cat", response_format="url", extra_body={"steps": 1})
    assert httpx.get(answer.data[0].url).content.startswith(b"\x89PNG")


def test_openais_client_follows_a_stream(site, small):
    stream = site.client().images.generate(
        prompt="a cat", stream=True, partial_images=2, extra_body={"seed": 5, "steps": 6}
    )
    found = list(stream)
    kinds = [event.type.removeprefix("image_generation.") for event in found]
    assert kinds.count("progress") == 6 and kinds.count("partial_image") == 2 and kinds[-1] == "completed"
    partials = [event.partial_image_index for event in found if event.type.endswith("partial_image")]
    assert partials == [0, 1] and found[-1].output_format == "png" and found[-1].size == "64x64"
    offline = small("a cat", num_inference_steps=6, seed=5, output_type="pil")[0]
    assert np.array_equal(as_array(found[-1].b64_json), np.asarray(offline))


def test_openais_client_lists_models_and_raises_its_own_errors(site):
    client = site.client()
    assert [model.id for model in client.models.list()] == ["small"]
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="a cat", n=99)
    assert (bad.value.param, bad.value.code, bad.value.type) == ("n", "invalid_value", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a cat", model="dall-e-3")
    with pytest.raises(openai.InternalServerError, match="generations is"):
        site.client(max_retries=2).images.edit(image=b"x", prompt="y")


def test_keys(small):
    with running(small, api_keys=["right"]) as site:
        assert site.client("right").images.generate(prompt="a cat", extra_body={"steps": 1}).data
        with pytest.raises(openai.AuthenticationError):
            site.client("wrong").images.generate(prompt="a cat")
        assert httpx.get(f"{site.url}/health").json()["ready"]


def test_a_full_queue_is_a_rate_limit_with_a_time(small):
    with running(small, max_active=1, max_queue=1, max_images=1) as site, streamed(site) as first:
        told = events(first)
        assert next(told)["step"] == 1
        with streamed(site) as second:
            assert second.status_code == 200
            with pytest.raises(openai.RateLimitError) as full:
                site.client().images.generate(prompt="a cat")
        assert int(full.value.response.headers["retry-after"]) >= 1
        first.close()
        site.until(lambda stats: stats.cancelled == 2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_picture_with_it(site, stream):
    before = site.stats
    body = json.dumps({"prompt": "a cat", "steps": 10_000, "n": 2, "stream": stream}).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        site.until(lambda stats: stats.active == 2 and stats.steps > before.steps + 2)
    site.until(lambda stats: stats.active == 0)
    assert site.stats.cancelled == before.cancelled + 2 and site.stats.images == before.images


def test_the_end_finishes_what_runs_and_hands_back_what_waits(small):
    """Answers stay possible until the last picture is there; then the server closes and returns 0."""
    site = Running(small, max_active=1)
    try:
        with streamed(site, steps=300) as first:
            told = events(first)
            assert next(told)["step"] == 1
            waiting = queue.Queue()
            body = {"prompt": "a cat", "steps": 1}
            thread = threading.Thread(
                target=lambda: waiting.put(httpx.post(f"{site.url}/v1/images/generations", json=body, timeout=WAIT))
            )
            thread.start()
            site.until(lambda stats: stats.queued == 1)
            site.server.stop()
            handed_back = waiting.get(timeout=WAIT)
            assert (handed_back.status_code, handed_back.json()["error"]["code"]) == (503, "server_shutting_down")
            assert int(handed_back.headers["retry-after"]) > 0
            last = list(told)[-1]
            assert last["type"] == "image_generation.completed"
    finally:
        assert site.end() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{site.url}/health")


def test_the_end_does_not_wait_longer_than_its_grace(small):
    site = Running(small, grace_seconds=0.1)
    try:
        with streamed(site) as first:
            told = events(first)
            assert next(told)["step"] == 1
            site.server.stop()
            assert list(told)[-1]["error"]["code"] == "server_shutting_down"
    finally:
        assert site.end() == 0


def test_an_address_in_use_is_an_os_error(small):
    with listen("127.0.0.1", 0) as taken, pytest.raises(OSError):
        Server(small, ServerSettings(port=taken.getsockname()[1])).run()


def test_addresses_are_urls():
    with listen("127.0.0.1", 0) as one:
        assert address(one) == f"http://127.0.0.1:{one.getsockname()[1]}"
    with contextlib.suppress(OSError), listen("::1", 0) as one:  # where there is IPv6
        assert address(one).startswith("http://[::1]:")
