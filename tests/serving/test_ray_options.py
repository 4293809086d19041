"""Replicas: options that contradict one another, and what Ray Serve is told, which takes it. No Ray runs here."""

import pytest

from sana.serving.ray_options import RayOptions
from sana.serving.settings import ServerSettings

SETTINGS = ServerSettings(max_active=6, max_queue=40, grace_seconds=12.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_replicas": 0}, "min_replicas must be at least 1"),
        ({"min_replicas": 3, "max_replicas": 2}, "must not be below min_replicas 3"),
        ({"num_cpus": 0}, "num_cpus must be more than 0"),
        ({"num_cpus": 1.5}, "num_cpus 1.5 must be a whole number, or a part of one"),
        ({"num_gpus": -1}, "num_gpus must be 0 or more"),
        ({"num_gpus": float("nan")}, "num_gpus must be 0 or more"),
        ({"target_ongoing_requests": 0.0}, "target_ongoing_requests must be more than 0"),
        ({"upscale_seconds": float("inf")}, "upscale_seconds must be more than 0"),
        ({"ray_address": "head:6379", "ray_dir": "x"}, "ray_dir has no effect with ray_address"),
        ({"ray_address": "ray://head:10001"}, "HOST:PORT"),
    ],
)
def test_what_cannot_be_is_said(options, said):
    with pytest.raises(ValueError, match=said):
        RayOptions(**options)


def test_a_replica_has_a_gpu_where_its_model_runs_on_one():
    assert RayOptions().gpus(None, 0) == 0 and RayOptions().gpus(None, 4) == 1
    assert RayOptions().gpus("cpu", 4) == 0 and RayOptions().gpus("cuda", 0) == 1
    assert RayOptions(num_gpus=0.5).gpus(None, 4) == 0.5 and RayOptions(num_gpus=0).gpus(None, 4) == 0
    for options, device, said in (
        (RayOptions(num_gpus=1), "cpu", "no effect with device cpu"),
        (RayOptions(num_gpus=0), "cuda", "needs num_gpus above 0"),
        (RayOptions(), "cuda:1", "cannot be chosen"),
    ):
        with pytest.raises(ValueError, match=said):
            options.gpus(device, 1)


@pytest.mark.parametrize(
    ("options", "gpus", "resources", "room"),
    [
        (RayOptions(), 0, {"CPU": 4.0}, 4),
        (RayOptions(num_cpus=0.5), 0, {"CPU": 2.0}, 4),
        (RayOptions(num_cpus=4), 0, {"CPU": 2.0}, 0),
        (RayOptions(), 1, {"CPU": 64.0, "GPU": 8.0}, 8),
        (RayOptions(), 0.5, {"CPU": 64.0, "GPU": 2.0}, 4),
        (RayOptions(), 0.4, {"CPU": 64.0, "GPU": 1.0}, 2),
        (RayOptions(), 1, {"CPU": 64.0}, 0),
    ],
)
def test_room_is_what_the_scarcer_resource_gives(options, gpus, resources, room):
    assert options.room(gpus, resources) == room


def test_ray_serve_takes_the_deployment():
    serve = pytest.importorskip("ray.serve", reason="needs Ray: pip install 'sana-python[ray]'")
    options = RayOptions(min_replicas=2, max_replicas=5, num_cpus=2, upscale_seconds=3, downscale_seconds=60)
    made = serve.deployment(**options.deployment(SETTINGS, 0.5))(type("Any", (), {}))
    scaling = made._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.initial_replicas) == (2, 5, 2)
    assert (scaling.target_ongoing_requests, scaling.upscale_delay_s, scaling.downscale_delay_s) == (3, 3, 60)
    assert made.ray_actor_options["num_cpus"] == 2 and made.ray_actor_options["num_gpus"] == 0.5
    assert made._deployment_config.graceful_shutdown_timeout_s == 12.5 and made.max_queued_requests == 40
    assert made.max_ongoing_requests > 6 + 40, "the engine turns requests away, in OpenAI's form"
