"""Serving through Ray, as far as it goes without one: checks before it starts, addresses, what it is handed."""

import socket
import sys

import pytest

from sana.pipelines.options import InferenceOptions
from sana.serving import ray_server
from sana.serving.ray_options import RayOptions
from sana.serving.settings import ServerSettings
from sana.utils.download import FetchError
from tests.serving.conftest import BUNDLED

NEEDS_RAY = "needs Ray: pip install 'sana-python[ray]'"


def test_without_the_extra_a_sentence_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(ValueError, match=r"needs ray: pip install 'sana-python\[ray\]'"):
        ray_server.serve_ray(InferenceOptions(), ServerSettings(), RayOptions())


def test_the_model_is_looked_for_before_ray_starts_and_its_path_holds_everywhere(monkeypatch):
    monkeypatch.chdir(BUNDLED.parent)
    prepared = ray_server.prepare(InferenceOptions(model_path="sana_tiny", device="cuda"))
    assert (prepared.model_path, prepared.device) == (str(BUNDLED), "cuda")
    with pytest.raises(FetchError, match="no_such_folder does not exist"):
        ray_server.prepare(InferenceOptions(model_path="no_such_folder"))
    for more, said in (({"compile": "graph"}, "compile"), ({"gpu_id": 1}, "gpu_id")):
        with pytest.raises(ValueError, match=f"{said} cannot take effect"):
            ray_server.prepare(InferenceOptions(model_path="sana_tiny", **more))


def test_a_port_is_held_for_rays_proxy_and_for_nobody_else():
    with ray_server.hold_port("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with socket.socket() as proxy:
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            proxy.bind(("127.0.0.1", port))
            proxy.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=10):
                assert proxy.accept(), "connections come to the one that listens"
            with pytest.raises(OSError), ray_server.hold_port("127.0.0.1", port):
                pass


def test_what_cannot_start_is_refused_on_this_machine_and_a_cluster_may_grow():
    resources = {"CPU": 2.0}
    ray_server.check_room(RayOptions(min_replicas=2), 0, resources)
    with pytest.raises(ValueError, match="no room for min_replicas 3 of 1 CPUs and 0 GPUs each; Ray has 2 CPUs"):
        ray_server.check_room(RayOptions(min_replicas=3, max_replicas=3), 0, resources)
    ray_server.check_room(RayOptions(min_replicas=3, max_replicas=3, ray_address="head:6379"), 0, resources)


def test_a_cluster_needs_a_port_that_all_its_machines_can_have():
    pytest.importorskip("ray.serve", reason=NEEDS_RAY)
    with pytest.raises(ValueError, match="port 0 goes with a Ray that is started here only"):
        ray_server.serve_ray(
            InferenceOptions(model_path=str(BUNDLED)), ServerSettings(port=0), RayOptions(ray_address="127.0.0.1:1")
        )


def test_the_deployment_is_small_and_takes_no_model_along():
    pytest.importorskip("ray.serve", reason=NEEDS_RAY)
    from ray import cloudpickle

    deployment = ray_server.replica_deployment(RayOptions().deployment(ServerSettings(), 0))
    sent = cloudpickle.dumps(deployment.func_or_class)
    assert len(sent) < 20_000
    assert hasattr(cloudpickle.loads(sent), "__serve_build_asgi_app__")


def test_waiting_ends_with_the_condition_or_with_a_sentence(monkeypatch):
    monkeypatch.setattr(ray_server, "LOOK_SECONDS", 0.001)
    answers = iter([False, False, True])
    ray_server.wait_until(lambda: next(answers), 60, "never")
    with pytest.raises(OSError, match=r"^It did not start within 0.01 s\.$"):
        ray_server.wait_until(lambda: False, 0.01, "It did not start")


def test_the_cause_of_a_replica_that_does_not_start_is_its_last_line():
    text = "Error:\nRuntimeError: Traceback:\n  File x\nsana.plan.MemoryLimitError: It is 8 MB: too much.\nsee logs\n"
    assert ray_server.cause(text) == "It is 8 MB: too much."
    assert ray_server.cause("Deploying failed:\nno resources") == "no resources"
    assert ray_server.cause("") == "Ray does not say why."
