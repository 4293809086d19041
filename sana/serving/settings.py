"""What a server allows, and how long it waits. Nothing is served here."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from sana.pipelines.inputs import MAX_STEPS

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server. Seconds are wall-clock seconds.

    Attributes:
        host, port: where it listens; port 0 is any free one.
        api_keys: any of them opens it; none: it is open.
        model_name: what clients call the model; None for the name of its folder or repository.
        max_active: pictures in work at a time.
        max_queue: pictures that may wait; with more, requests get 429.
        max_images: pictures of one request (n).
        max_steps: denoising steps of a picture.
        max_pixels: of a picture; None for four times the model's own.
        max_aspect: longer side over shorter side.
        max_prompt: characters of a prompt, and of a negative prompt.
        max_body: bytes of a request's body.
        max_connections: open at a time; more get 503.
        request_seconds: from a request to its pictures; after that 504, and what is in work is given up.
        body_seconds: for a client to send a body; after that 408.
        header_seconds: for a client to send a request's head; after that it is cut off.
        write_seconds: for a client to take what waits for it; after that it is cut off.
        grace_seconds: for pictures in work when the server is asked to end.
        keep_files: pictures kept for `response_format: url`, at most ...
        keep_bytes: ... so many bytes ...
        keep_seconds: ... for so long.
        public_url: what a client puts before /files/...; None for the address it asked.
        debug: whether errors are logged with their traceback, which may show paths and prompts.
    """

    host: str = LOOPBACK
    port: int = 8000
    api_keys: Sequence[str] = ()
    model_name: str | None = None
    max_active: int = 8
    max_queue: int = 64
    max_images: int = 10
    max_steps: int = 100
    max_pixels: int | None = None
    max_aspect: float = 4.0
    max_prompt: int = 4000
    max_body: int = 64 * 1024
    max_connections: int = 512
    request_seconds: float = 600.0
    body_seconds: float = 15.0
    header_seconds: float = 10.0
    write_seconds: float = 60.0
    grace_seconds: float = 30.0
    keep_files: int = 1000
    keep_bytes: int = 2**30
    keep_seconds: float = 3600.0
    public_url: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and field.name != "port" and not value > 0:
                raise ValueError(f"{field.name} must be more than 0, not {value!r}.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, not {self.port}.")
        if self.max_steps > MAX_STEPS:
            raise ValueError(f"max_steps {self.max_steps} must not exceed {MAX_STEPS}, the pipeline's own limit.")
        if self.max_images > self.max_queue:
            raise ValueError(f"max_images {self.max_images} must not exceed max_queue {self.max_queue}.")
        if any(not key.strip() or key != key.strip() or not key.isascii() for key in self.api_keys):
            raise ValueError("An API key must be ASCII text without spaces around it; one is not.")

    def pixels(self, image_size: int) -> int:
        """Returns the greatest number of pixels of a picture for a model of that size."""
        return self.max_pixels or 4 * image_size**2
