"""A replica without Ray: the application of the single server, with a shared store, labels and an end of its own."""

import asyncio
import base64
import io
import pickle
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from sana.pipelines.options import InferenceOptions
from sana.serving import ray_replica
from sana.serving.ray_replica import Labelled, Replica
from sana.serving.settings import ServerSettings
from sana.serving.store import PictureStore

SETTINGS = ServerSettings(max_steps=4, max_queue=4, max_images=2, grace_seconds=1)
POST = "/v1/images/generations"


class Actor:
    """A handle as Ray gives it: what its methods return waits behind `remote` and `get`."""

    def __init__(self, target):
        for name in ("put", "get"):
            setattr(self, name, SimpleNamespace(remote=getattr(target, name)))


@pytest.fixture
def replica(monkeypatch, small):
    """Makes replicas that share a store; Ray's own part is played by this process."""
    names, made = iter("abc"), []
    context = SimpleNamespace(get_replica_context=lambda: SimpleNamespace(replica_tag=next(names)))
    monkeypatch.setattr(ray_replica, "need", lambda module: context)
    monkeypatch.setattr(ray_replica, "need_ray", lambda: SimpleNamespace(get=lambda value, timeout: value))
    monkeypatch.setattr(ray_replica, "open_model", lambda options, settings, lower: (small, settings))
    with PictureStore(10, 10**6, 60) as store:

        def make():
            made.append(Replica(InferenceOptions(), SETTINGS, Actor(store)))
            return made[-1]

        yield make
        for one in made:
            one.engine.close()


def ask(replica, method, path, **options):
    async def once():
        transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:
            return await client.request(method, path, **options)

    return asyncio.run(once())


def test_a_replica_answers_as_the_single_server_does_and_signs_it(replica, small):
    one = replica()
    answer = ask(one, "POST", POST, json={"prompt": "a cat", "steps": 2, "seed": 5})
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    offline = small("a cat", num_inference_steps=2, seed=5, output_type="pil")[0]
    assert np.array_equal(np.asarray(picture), np.asarray(offline))
    wrong = ask(one, "POST", POST, json={"prompt": "a cat", "n": 99})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "n")
    assert {answer.headers["x-sana-replica"], wrong.headers["x-sana-replica"]} == {"a"}


def test_a_picture_of_one_replica_is_fetched_from_another(replica):
    first, second = replica(), replica()
    content = {"prompt": "a cat", "steps": 1, "response_format": "url"}
    address = ask(first, "POST", POST, json=content).json()["data"][0]["url"].removeprefix("http://site")
    fetched = [ask(one, "GET", address) for one in (first, second)]
    assert [one.headers["x-sana-replica"] for one in fetched] == ["a", "b"]
    assert fetched[0].content == fetched[1].content and fetched[0].content.startswith(b"\x89PNG")
    assert ask(second, "GET", "/files/none.png").status_code == 404


def test_numbers_carry_the_name_of_their_replica(replica):
    one = replica()
    ask(one, "GET", "/health")
    families = list(text_string_to_metric_families(ask(one, "GET", "/metrics").text))
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels.get("replica") for sample in samples} == {"a"}
    routes = [one.value for one in samples if one.name == "sana_requests_total" and one.labels["route"] == "/health"]
    assert routes == [1]
    assert list(Labelled(SimpleNamespace(collect=list), replica="x").collect()) == []


def test_a_broken_engine_is_bad_health_and_an_ended_one_is_not(replica):
    broken, ended = replica(), replica()
    broken.check_health()
    broken.engine.close()
    with pytest.raises(RuntimeError, match="engine of this replica stopped"):
        broken.check_health()
    asyncio.run(ended.finish())
    ended.check_health()
    answer = ask(ended, "POST", POST, json={"prompt": "a cat"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_shutting_down")
    assert int(answer.headers["retry-after"]) > 0
    ended.__del__()


def test_what_ray_sends_to_a_replica_can_be_sent():
    sent = InferenceOptions(model_path="x"), SETTINGS
    assert pickle.loads(pickle.dumps(sent)) == sent
