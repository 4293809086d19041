"""Serving through Ray: starts it or joins one, deploys replicas, and ends them. A replica is in `ray_replica.py`."""

import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from sana.pipelines import batch
from sana.pipelines.options import InferenceOptions
from sana.serving.extras import need, need_ray
from sana.serving.model import check_model
from sana.serving.ray_options import NAME, RayOptions
from sana.serving.ray_replica import Replica
from sana.serving.server import url, warn_if_open
from sana.serving.settings import ServerSettings
from sana.serving.store import PictureStore
from sana.utils.logging import get_logger

logger = get_logger(__name__)

STORE_BYTES = 512 * 2**20  # of a Ray that is started here: answers on their way
LOOK_SECONDS = 1.0  # between two looks at the replicas
START_SECONDS = 300.0  # for Ray's proxies, after the replicas
LAST_WORDS_SECONDS = 10.0  # for answers that are on their way when everything else has ended
PATIENCE = {  # a busy machine needs more than Ray's 5 and 10 seconds to start a process
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
}
ERROR_LINE = re.compile(r"([A-Za-z_]+\.)*[A-Za-z_]*(?:Error|Exception): (.+)")  # at the end of a traceback
CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")  # name and namespace of a running Ray Serve


class _AskedToEndError(BaseException):
    """SIGTERM or Ctrl-C. No `Exception`, so that no library takes it for its own."""


def serve_ray(
    options: InferenceOptions,
    settings: ServerSettings,
    ray_options: RayOptions,
    on_ready: Callable[[str], None] | None = None,
    *,
    lower: bool = False,
) -> int:
    """Serves a model with replicas until the process is asked to end.

    Args:
        options: as of `server.serve`.
        settings: of the server; its limits hold for each replica. Those of connections have no effect: Ray's proxy
            holds the connections.
        ray_options: replicas, and the Ray they run on.
        on_ready: called with the server's address as soon as replicas are there.
        lower: see `open_model`.

    Returns:
        0: it was asked to end.

    Raises:
        ValueError: the extra `ray` is missing, or an option is wrong.
        ConfigError, FetchError, CheckpointError, OSError: the model cannot be had, the address not be listened at, Ray
            not be reached, or no replica start.
    """
    ray = need_ray()
    options = prepare(options)
    with ExitStack() as stack:
        if not ray_options.ray_address:
            held = stack.enter_context(hold_port(settings.host, settings.port))
            settings = replace(settings, port=held.getsockname()[1])
        elif settings.port == 0:
            raise ValueError("port 0 goes with a Ray that is started here only: every machine of a cluster has it.")
        warn_if_open(settings)
        stack.enter_context(_ray(ray, ray_options))
        gpus = ray_options.gpus(options.device, int(ray.cluster_resources().get("GPU", 0)))
        check_room(ray_options, gpus, ray.cluster_resources())
        deployment = ray_options.deployment(settings, gpus)
        service = Service(ray, deployment, (options, settings), lower=lower)
        try:
            with suppress(_AskedToEndError), _asked_to_end(), service:  # also while replicas start
                _serve(service, settings, on_ready)
        except ray.exceptions.RayError as error:
            raise OSError(f"Ray failed: {type(error).__name__}. Its logs are in its folder (/tmp/ray).") from error
    return 0


def _serve(service: "Service", settings: ServerSettings, on_ready: Callable[[str], None] | None) -> None:
    """Starts the replicas and looks at them until a signal comes; then lets them finish, unless another one comes."""
    service.start()
    if on_ready is not None:
        on_ready(url(settings.host, settings.port))
    try:
        service.watch()
    except _AskedToEndError:
        logger.info("asked to end: finishing the pictures in work")
        service.finish()


def prepare(options: InferenceOptions) -> InferenceOptions:
    """Checks a model's options before Ray starts, and makes paths of this machine absolute for the replicas.

    Raises:
        ValueError: an option cannot take effect.
        ConfigError, FetchError, CheckpointError, OSError: the model cannot be had.
    """
    check_model(options)
    if options.gpu_id is not None:
        raise ValueError("gpu_id cannot take effect: Ray gives every replica GPUs of its own; leave it out.")
    batch.name_pipeline(replace(options, device="cpu"))  # its sentences are better than a replica's
    paths = {"config": options.config, "model_path": options.weights}
    found: dict[str, Any] = {
        name: str(Path(path).expanduser().absolute()) for name, path in paths.items() if path and _here(path)
    }
    return replace(options, **found)


def _here(path: str) -> bool:
    with suppress(OSError, ValueError):
        return Path(path).expanduser().exists()
    return False


@contextmanager
def hold_port(host: str, port: int) -> Iterator[socket.socket]:
    """Keeps an address for Ray's proxy, which shares it: so that nobody takes it, and nobody who has it is joined.

    Args:
        host, port: port 0 is any free one.

    Raises:
        OSError: it is in use, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        port = listener.getsockname()[1]
    with socket.socket(family, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
        yield held


@contextmanager
def _ray(ray: Any, options: RayOptions) -> Iterator[None]:
    """Starts Ray here, on this machine's loopback, or joins one; leaves it at the end, which ends one started here."""
    if options.ray_address:
        try:
            ray.init(options.ray_address, namespace=NAME, log_to_driver=False)
        except ConnectionError as error:
            raise OSError(f"No Ray answers at {options.ray_address}; start one with 'ray start --head'.") from error
    else:
        ray.init(
            "local",
            namespace=NAME,
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            log_to_driver=True,
            _temp_dir=options.ray_dir and str(Path(options.ray_dir).absolute()),
        )
    try:
        yield
    finally:
        ray.shutdown()


def check_room(options: RayOptions, gpus: float, resources: dict[str, float]) -> None:
    """Refuses what can never start on this machine; of a cluster, which may grow, only says it.

    Args:
        options: of the replicas.
        gpus: of each.
        resources: "CPU" and "GPU" of the Ray.

    Raises:
        ValueError: there is no room for `min_replicas`.
    """
    room = options.room(gpus, resources)
    have = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
    if room >= options.max_replicas:
        return
    text = f"of {options.num_cpus:g} CPUs and {gpus:g} GPUs each; Ray has {have}"
    if room < options.min_replicas and not options.ray_address:
        raise ValueError(
            f"There is no room for min_replicas {options.min_replicas} {text}. Lower --min_replicas, or --num_cpus and "
            "--num_gpus, of which parts are allowed."
        )
    logger.warning("there is room for %d replicas %s", room, text)


@contextmanager
def _asked_to_end() -> Iterator[None]:
    """Turns SIGTERM and SIGINT into an exception, wherever the main thread is."""

    def ask(number: int, frame: FrameType | None) -> None:
        raise _AskedToEndError

    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, ask) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


class Service:
    """The replicas as one service. A context manager; Ray runs.

    Args:
        ray: the package.
        deployment: what `ray.serve.deployment` is given.
        model: options of the model, and settings of the server.
        lower: see `open_model`.
    """

    def __init__(
        self, ray: Any, deployment: dict[str, Any], model: tuple[InferenceOptions, ServerSettings], *, lower: bool
    ) -> None:
        self.ray, self.serve = ray, need("ray.serve")
        self.deployment, self.lower = deployment, lower
        self.options, self.settings = model
        self._store: Any = None
        self._handle: Any = None

    def __enter__(self) -> "Service":
        with suppress(ValueError):  # there is none
            self.ray.get_actor(*CONTROLLER)
            raise OSError("Ray Serve runs on this cluster already; end it first with 'serve shutdown'.")
        return self

    def __exit__(self, *_: object) -> None:
        """Takes everything down that `start` has put up."""
        failures = (self.ray.exceptions.RayError, TimeoutError, _AskedToEndError)
        if self._store is not None:
            with suppress(*failures):
                self.ray.get(self._store.close.remote(), timeout=LAST_WORDS_SECONDS)
        with suppress(*failures):
            self.serve.shutdown()

    def start(self) -> None:
        """Returns when the first replicas answer.

        Raises:
            OSError: they do not.
        """
        settings = self.settings
        store = self.ray.remote(num_cpus=0, max_restarts=-1)(PictureStore)
        self._store = store.remote(settings.keep_files, settings.keep_bytes, settings.keep_seconds)
        http = {"host": settings.host, "port": settings.port}
        controller = {"runtime_env": {"env_vars": PATIENCE}}
        with suppress(TimeoutError):  # of a minute; what follows waits longer
            self.serve.start(proxy_location="EveryNode", http_options=http, controller_options=controller)
        bound = replica_deployment(self.deployment).bind(self.options, settings, self._store, lower=self.lower)
        try:
            self._handle = self.serve.run(bound, name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise OSError(f"No replica could start: {cause(self._trouble() or str(error))}") from error
        wait_until(lambda: self._listening(), START_SECONDS, "Ray's proxy did not start")

    def _listening(self) -> bool:
        proxies = self.serve.status().proxies.values()
        return bool(proxies) and all(one == "HEALTHY" for one in proxies)

    def _trouble(self) -> str:
        """Returns what Ray tells of the deployment: with the traceback of a replica that did not start."""
        application = self.serve.status().applications.get(NAME)
        deployment = application.deployments.get(NAME) if application is not None else None
        return str(deployment.message) if deployment is not None else ""

    def watch(self) -> None:
        """Tells how many replicas run, for as long as the service is there.

        Raises:
            OSError: it is not, any more.
        """
        never, before = threading.Event(), -1
        while True:
            application = self.serve.status().applications.get(NAME)
            if application is None:
                raise OSError("The service was taken off its Ray.")
            running = int(application.deployments[NAME].replica_states.get("RUNNING", 0))
            if running != before:
                logger.info("replicas: %d", running)
            before = running
            never.wait(LOOK_SECONDS)

    def finish(self) -> None:
        """Makes every replica finish what is in work, and hand back what waits; meanwhile all answer 503."""
        wait = self.settings.grace_seconds + LAST_WORDS_SECONDS
        with suppress(TimeoutError, self.ray.exceptions.RayError):
            self._handle.broadcast("finish").results(timeout_s=wait, return_exceptions=True)


def replica_deployment(deployment: dict[str, Any]) -> Any:
    """Returns `Replica` as Ray Serve deploys it: its application is built where it runs, and never sent."""
    serve = need("ray.serve")
    return serve.deployment(**deployment)(serve.ingress()(Replica))


def wait_until(condition: Callable[[], bool], seconds: float, failure: str) -> None:
    """Returns when a condition holds.

    Raises:
        OSError: it does not within `seconds`; with the text `failure`.
    """
    end, never = time.monotonic() + seconds, threading.Event()
    while not condition():
        if time.monotonic() > end:
            raise OSError(f"{failure} within {seconds:g} s.")
        never.wait(LOOK_SECONDS)


def cause(text: str) -> str:
    """Returns what the error says, of what Ray tells of a replica that did not start."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [found[2] for line in lines if (found := ERROR_LINE.fullmatch(line))]
    return (named or lines or ["Ray does not say why."])[-1]
