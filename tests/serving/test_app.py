"""The HTTP interface against the ASGI application: shapes, keys, limits, leaks, and fuzzed requests."""

import asyncio
import base64
import io
import json
import logging
import threading
from contextlib import ExitStack, contextmanager

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sana.pipelines.images import read_recipe
from sana.serving.app import build_app, mistakable
from sana.serving.engine import Engine
from sana.serving.service import Service
from sana.serving.settings import ServerSettings
from sana.serving.store import PictureStore

POST = "/v1/images/generations"
SECRET = "my secret prompt"


class Site:
    """An application with its engine, and a client that needs no network."""

    def __init__(self, stack, pipeline, **options):
        self.settings = ServerSettings(**{"max_steps": 4, "max_images": 3, "max_queue": 4, **options})
        self.engine = stack.enter_context(
            Engine(pipeline, max_active=self.settings.max_active, max_queue=self.settings.max_queue)
        )
        self.service = Service(self.engine, self.settings)
        self.app = build_app(self.service, stack.enter_context(PictureStore(10, 10**6, 60)))
        self.runner = stack.enter_context(asyncio.Runner())

    def ask(self, method, path, **options):
        async def once():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:
                return await client.request(method, path, **options)

        return self.runner.run(once())

    def post(self, **content):
        return self.ask("POST", POST, json={"prompt": "a cat", "steps": 1, **content})


@contextmanager
def site_of(pipeline, **options):
    with ExitStack() as stack:
        yield Site(stack, pipeline, **options)


@pytest.fixture(scope="module")
def site(small):
    with site_of(small) as made:
        yield made


def picture(datum):
    return Image.open(io.BytesIO(base64.b64decode(datum["b64_json"])))


def is_error(response, status):
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


def test_pictures_are_those_of_the_pipeline_with_their_recipes(site, small, tmp_path):
    answer = site.post(prompt="a cat", n=2, seed=7, steps=2, guidance=3, pag=2, negative_prompt="dog", size="96x64")
    offline = small("a cat", height=64, width=96, num_inference_steps=2, seed=7, num_images_per_prompt=2,
                    guidance_scale=3.0, pag_scale=2.0, negative_prompt="dog", output_type="pil")  # fmt: skip
    content = answer.json()
    assert (answer.status_code, content["size"], content["output_format"]) == (200, "96x64", "png")
    for index, (datum, expected) in enumerate(zip(content["data"], offline, strict=True)):
        assert datum["seed"] == 7 + index
        assert np.array_equal(np.asarray(picture(datum)), np.asarray(expected))
        (tmp_path / "a.png").write_bytes(base64.b64decode(datum["b64_json"]))
        recipe = read_recipe(tmp_path / "a.png")
        assert (recipe["prompt"], recipe["seed"], recipe["weights"]) == ("a cat", 7 + index, small.weights_hash())
        assert small.model_path not in json.dumps(recipe)


def test_pictures_by_address_are_fetched_without_a_key(small):
    with site_of(small, api_keys=["k"]) as site:
        answer = site.ask("POST", POST, json={"prompt": "a cat", "steps": 1, "response_format": "url"},
                          headers={"Authorization": "Bearer k"})  # fmt: skip
        url = answer.json()["data"][0]["url"]
        assert url.startswith("http://site/files/")
        fetched = site.ask("GET", url)
        assert fetched.headers["content-type"] == "image/png" and fetched.content.startswith(b"\x89PNG")
        is_error(site.ask("GET", "/files/other.png"), 404)
        is_error(site.ask("GET", "/files/..%2f..%2fetc%2fpasswd"), 404)


def test_a_slow_store_delays_nobody_else(small):
    """Its disk may be slow, or its machine another one: meanwhile the loop answers."""
    with site_of(small) as site:
        asked, answered = threading.Event(), threading.Event()

        class Slow:
            def put(self, png):
                asked.set()
                assert answered.wait(60), "nobody is answered while a picture is stored"
                return "a.png"

            def get(self, name):
                return bytes([answered.wait(60)])

        app = build_app(site.service, Slow())

        async def both(method, path, **options):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://site") as client:
                waiting = asyncio.create_task(client.request(method, path, **options))
                await asyncio.to_thread(asked.wait, 60)
                assert (await client.get("/health/live")).status_code == 200
                answered.set()
                return await waiting

        wish = {"prompt": "a cat", "steps": 1, "response_format": "url"}
        made = site.runner.run(both("POST", POST, json=wish)).json()
        assert made["data"][0]["url"] == "http://site/files/a.png"
        answered.clear()
        assert site.runner.run(both("GET", "/files/a.png")).content == b"\x01"


def test_a_public_url_stands_before_the_names(small):
    with site_of(small, public_url="https://pictures.example/") as site:
        assert site.post(response_format="url").json()["data"][0]["url"].startswith("https://pictures.example/files/")


def test_everything_but_health_and_files_needs_a_key(small):
    with site_of(small, api_keys=["k1", "k2"]) as site:
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", POST), ("POST", "/v1/images/edits")):
            assert is_error(site.ask(method, path), 401)["code"] == "invalid_api_key"
            assert is_error(site.ask(method, path, headers={"Authorization": "Bearer k3"}), 401)
        for path in ("/health", "/health/live", "/health/ready"):
            assert site.ask("GET", path).status_code == 200
        assert site.ask("GET", "/v1/models", headers={"Authorization": "Bearer k2"}).status_code == 200


def test_models(site):
    listed = site.ask("GET", "/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert site.ask("GET", f"/v1/models/{model['id']}").json() == model
    is_error(site.ask("GET", "/v1/models/gpt-image-1"), 404)


def test_what_is_not_there_says_so(site):
    assert is_error(site.ask("POST", "/v1/images/edits", content=b"x"), 501)["code"] == "not_implemented"
    is_error(site.ask("GET", "/nowhere"), 404)
    is_error(site.ask("GET", POST), 405)
    is_error(site.ask("POST", POST, content=b"prompt=x"), 415)
    is_error(site.ask("POST", POST, content=b"{", headers={"Content-Type": "application/json"}), 400)


def test_a_full_queue_is_a_429_with_a_time(small):
    with site_of(small, max_active=1, max_queue=1, max_images=1) as site:
        answers = []

        async def many():
            transport = httpx.ASGITransport(site.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:
                body = {"prompt": "a cat", "steps": 4, "seed": 1}
                return await asyncio.gather(*(client.post(POST, json=body) for _ in range(12)))

        for answer in site.runner.run(many()):
            if answer.status_code != 200:
                assert is_error(answer, 429)["code"] == "rate_limit_exceeded"
                assert int(answer.headers["retry-after"]) >= 1
                answers.append(answer)
        assert answers, "twelve at once fit into a queue of one"
        assert site.engine.stats().rejected == len(answers)


def test_a_request_whose_time_is_up_is_a_504_and_stops(small):
    with site_of(small, max_steps=10_000, request_seconds=0.2) as site:
        assert is_error(site.post(steps=10_000), 504)["code"] == "timeout"
        while not site.engine.idle:
            assert site.engine.alive
        assert site.engine.stats().cancelled == 1 and site.engine.stats().steps < 10_000


def test_a_stopping_server_hands_requests_back(small):
    with site_of(small) as site:
        site.engine.drain()
        answer = site.post()
        assert is_error(answer, 503)["code"] == "server_shutting_down" and int(answer.headers["retry-after"]) > 0
        assert site.ask("GET", "/health").json() == {"status": "stopping", "live": True, "ready": False}
        assert site.ask("GET", "/health/live").status_code == 200
        assert site.ask("GET", "/health/ready").status_code == 503


def test_an_unforeseen_error_is_answered_and_logged_without_what_it_knows(small, monkeypatch, caplog):
    def breaks(*args, **kwargs):
        raise RuntimeError(f"/srv/secret/path {SECRET}")

    with site_of(small) as site, caplog.at_level(logging.DEBUG):
        monkeypatch.setattr(small.autoencoder, "decode", breaks)
        answer = site.post(prompt=SECRET)
        streamed = site.post(prompt=SECRET, stream=True)
    error = is_error(answer, 500)
    number = error["message"].split()[-1].rstrip(".")
    assert number in caplog.text and "RuntimeError" in caplog.text
    last = json.loads(streamed.text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "internal_error"
    for text in (answer.text, streamed.text, caplog.text):
        assert SECRET not in text and "/srv" not in text and "Traceback" not in text


def test_numbers_that_are_not_finite_are_a_500_with_their_name(small, monkeypatch):
    with site_of(small) as site:
        with torch.no_grad():
            weight = small.transformer.final_layer.linear.weight
            before = weight.clone()
            weight.fill_(torch.nan)
        try:
            assert is_error(site.post(), 500)["code"] == "not_finite"
        finally:
            with torch.no_grad():
                weight.copy_(before)
        assert site.post().status_code == 200


def test_prompts_are_not_logged(site, caplog):
    with caplog.at_level(logging.DEBUG):
        site.post(prompt=SECRET)
        site.post(prompt=SECRET, n=99)
    assert POST in caplog.text and SECRET not in caplog.text


def test_metrics_count(small):
    with site_of(small) as site:
        site.post(n=2, steps=3)
        site.post(n=0)
        site.ask("GET", "/invented/path")
        page = site.ask("GET", "/metrics").text
    assert "sana_images_total 2.0" in page and "sana_steps_total 6.0" in page and "sana_queued 0.0" in page
    assert f'sana_requests_total{{route="{POST}",status="200"}} 1.0' in page
    assert f'sana_requests_total{{route="{POST}",status="400"}} 1.0' in page
    assert 'sana_requests_total{route="other",status="404"} 1.0' in page and "invented" not in page
    assert f'sana_request_seconds_count{{route="{POST}"}} 2.0' in page


def test_a_stream_tells_every_step_previews_and_pictures(site, small):
    text = site.post(stream=True, n=2, steps=4, seed=3, partial_images=1).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    offline = small("a cat", num_inference_steps=4, seed=3, num_images_per_prompt=2, output_type="pil")
    for index in range(2):
        own = [event for event in events if event["image_index"] == index]
        steps = [event["step"] for event in own if event["type"] == "image_generation.progress"]
        assert steps == [1, 2, 3, 4]
        (partial,) = [event for event in own if event["type"] == "image_generation.partial_image"]
        assert partial["partial_image_index"] == 0 and picture(partial).size == (64, 64)
        assert own[-1]["type"] == "image_generation.completed"
        assert np.array_equal(np.asarray(picture(own[-1])), np.asarray(offline[index]))


@pytest.mark.parametrize("headers", [{"Content-Length": "2", "Transfer-Encoding": "chunked"}])
@pytest.mark.parametrize("path", [POST, "/health", "/nothing"])
def test_a_request_that_ends_in_two_places_is_refused_and_its_connection_closed(site, path, headers):
    answer = site.ask("POST", path, content=b"{}", headers={"Content-Type": "application/json", **headers})
    assert is_error(answer, 400)["code"] == "invalid_http" and answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("version", "names", "expected"),
    [
        ("1.1", ["content-length"], False), ("1.1", ["transfer-encoding"], False), ("1.0", ["content-length"], False),
        ("1.1", ["transfer-encoding", "host", "content-length"], True), ("1.0", ["transfer-encoding"], True),
    ],
)  # fmt: skip
def test_requests_that_a_proxy_could_take_for_others(version, names, expected):
    headers = [(name.encode(), b"x") for name in names]
    assert mistakable({"http_version": version, "headers": headers}) is expected


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
    | st.sampled_from(["auto", "64x64", "64X64", "1e9x1", "url", "b64_json", "png", "99999x9", 1, 2, 0.5, -1, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(
    ["prompt", "n", "size", "seed", "steps", "guidance", "pag", "negative_prompt", "response_format", "stream", "user"]
)
BODIES = (
    st.dictionaries(NAMES | st.text(max_size=8), VALUES, max_size=6)
    | st.fixed_dictionaries({"prompt": st.text(max_size=30)}, optional={
        "n": st.integers(-1, 5), "steps": st.integers(-1, 6), "size": st.sampled_from(["64x64", "32x128", "x"]),
        "guidance": st.floats(-1, 200, allow_nan=False), "pag": st.floats(0, 5), "seed": st.integers(-1, 2**54),
        "stream": st.booleans(), "partial_images": st.integers(0, 3)})
    | VALUES
)  # fmt: skip


@given(body=BODIES.map(lambda one: json.dumps(one).encode()) | st.binary(max_size=100))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_is_a_500(site, body):
    answer = site.ask("POST", POST, content=body, headers={"Content-Type": "application/json"})
    if answer.status_code == 200:
        assert "b64_json" in answer.text or "url" in answer.text
        assert '"error"' not in answer.text
    else:
        is_error(answer, 400 if answer.status_code != 404 else 404)
    assert site.engine.idle and site.engine.ready


@given(
    method=st.sampled_from(["GET", "PUT", "DELETE", "PATCH", "POST", "OPTIONS", "HEAD"]),
    path=st.text([chr(one) for one in range(33, 127) if chr(one) not in "?#\\"], max_size=30)
    | st.sampled_from([POST, "/v1/models/", "/files/", "/metrics", "/health/", "/v1/images/edits"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_address_is_a_500(site, method, path):
    answer = site.ask(method, httpx.URL(scheme="http", host="site", raw_path=b"/" + path.lstrip("/").encode()))
    assert answer.status_code < 500 or (answer.status_code, path) == (501, "/v1/images/edits")
