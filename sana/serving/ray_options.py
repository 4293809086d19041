"""How the server is spread over replicas by Ray Serve: options, and what Ray is told of them. No Ray is needed here."""

import math
from dataclasses import dataclass
from typing import Any

from sana.serving.settings import ServerSettings

NAME = "sana"  # of the application, and of its one deployment
SPARE_REQUESTS = 16  # that a replica takes beside its pictures: /health, /metrics, and those that it turns away itself
HEALTH_SECONDS = 2.0  # between two looks at a replica; after three bad ones Ray puts another in its place
QUEUE_RETRY_SECONDS = 5  # what Ray tells a client when no replica takes requests and too many wait


@dataclass(frozen=True)
class RayOptions:
    """Replicas and the Ray they run on.

    Attributes:
        min_replicas, max_replicas: each holds the whole model; Ray chooses how many there are.
        target_ongoing_requests: requests at a time that a replica should have; None for half of `max_active`.
        num_cpus: that Ray reserves for a replica. On a CPU it computes with as many threads.
        num_gpus: that Ray reserves for a replica; None: one where the model runs on a GPU. 0.5 puts two on one GPU.
        upscale_seconds: of more load until there are more replicas.
        downscale_seconds: of less load until there are fewer.
        ray_address: of a running Ray; None starts one on this machine, for as long as the server runs.
        ray_dir: folder of a Ray that is started here, for its logs and sockets; None for Ray's own.

    Raises:
        ValueError: a number is impossible, or an option has no effect beside another.
    """

    min_replicas: int = 1
    max_replicas: int = 2
    target_ongoing_requests: float | None = None
    num_cpus: float = 1.0
    num_gpus: float | None = None
    upscale_seconds: float = 10.0
    downscale_seconds: float = 300.0
    ray_address: str | None = None
    ray_dir: str | None = None

    def __post_init__(self) -> None:
        if self.min_replicas < 1:
            raise ValueError(f"min_replicas must be at least 1, not {self.min_replicas}: the first has to load.")
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} must not be below min_replicas {self.min_replicas}; give both."
            )
        for name in ("target_ongoing_requests", "num_cpus", "upscale_seconds", "downscale_seconds"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be more than 0, not {value:g}.")
        if self.num_gpus is not None and not (self.num_gpus >= 0 and math.isfinite(self.num_gpus)):
            raise ValueError(f"num_gpus must be 0 or more, not {self.num_gpus:g}.")
        for name in ("num_cpus", "num_gpus"):
            value = getattr(self, name)
            if value is not None and value > 1 and value % 1:
                raise ValueError(f"{name} {value:g} must be a whole number, or a part of one; Ray divides only one.")
        if self.ray_address is not None and self.ray_dir is not None:
            raise ValueError("ray_dir has no effect with ray_address: that Ray has its folder already.")
        if (self.ray_address or "").startswith("ray://"):
            raise ValueError("ray_address must be the cluster's own HOST:PORT (6379), not a ray:// client's address.")

    def gpus(self, device: str | None, available: int) -> float:
        """Returns the GPUs of a replica.

        Args:
            device: that was asked for; None for the pipeline's choice.
            available: GPUs that Ray knows.

        Raises:
            ValueError: device and number contradict each other.
        """
        if device is not None and device.startswith("cuda:"):
            raise ValueError(f"device {device} cannot be chosen: Ray gives every replica GPUs of its own; give cuda.")
        if device == "cpu" and self.num_gpus:
            raise ValueError(f"num_gpus {self.num_gpus:g} has no effect with device cpu; leave one of them out.")
        if device == "cuda" and self.num_gpus == 0:
            raise ValueError("device cuda needs num_gpus above 0: a replica sees no other GPUs than its own.")
        if self.num_gpus is not None:
            return self.num_gpus
        return 1.0 if device == "cuda" or (device is None and available) else 0.0

    def deployment(self, settings: ServerSettings, gpus: float) -> dict[str, Any]:
        """Returns what `ray.serve.deployment` is given.

        The queue that counts is the engine's, in each replica, which turns away in OpenAI's form and knows for how
        long; Ray's own, in front of them, is reached only while replicas start.
        """
        return {
            "name": NAME,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": gpus},
            "max_ongoing_requests": settings.max_active + settings.max_queue + SPARE_REQUESTS,
            "max_queued_requests": settings.max_queue,
            "backpressure_config": {"status_code": 429, "retry_after_s": QUEUE_RETRY_SECONDS},
            "graceful_shutdown_timeout_s": settings.grace_seconds,
            "health_check_period_s": HEALTH_SECONDS,
            "max_constructor_retry_count": 1,
            "logging_config": {"enable_access_log": False},  # the application writes its own
            "autoscaling_config": {
                "min_replicas": self.min_replicas,
                "max_replicas": self.max_replicas,
                "initial_replicas": self.min_replicas,
                "target_ongoing_requests": self.target_ongoing_requests or max(1.0, settings.max_active / 2),
                "upscale_delay_s": self.upscale_seconds,
                "downscale_delay_s": self.downscale_seconds,
            },
        }

    def room(self, gpus: float, resources: dict[str, float]) -> int:
        """Returns how many replicas fit into what a Ray has.

        Args:
            gpus: of a replica.
            resources: "CPU" and "GPU" of that Ray.
        """
        room = resources.get("CPU", 0.0) / self.num_cpus
        if gpus:
            whole = resources.get("GPU", 0.0)
            room = min(room, whole / gpus if gpus >= 1 else whole * (1 // gpus))
        return int(room)
