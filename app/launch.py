"""Where the web app is found and who may use it: address, port, passwords, signals. No page is here."""

import contextlib
import importlib
import io
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sana.utils.hub import FetchError
from sana.utils.logging import get_logger

logger = get_logger(__name__)

PORT = 15432
MAX_PORT = 65535
THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
UPLOAD = "64mb"  # of a picture that is dropped into the page


@dataclass(frozen=True)
class Door:
    """Where the page is found, and who is let in.

    Attributes:
        host: address to listen at.
        port: 0 for any free one.
        share: make a public link through Gradio's service.
        logins: names and passwords; empty lets everybody in.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    share: bool = False
    logins: tuple[tuple[str, str], ...] = ()


def need_gradio() -> None:
    """Raises ValueError, with the command that installs it, where Gradio is missing."""
    try:
        importlib.import_module("gradio")
    except ImportError as error:
        raise ValueError(f"The web app needs {error.name or 'gradio'}: pip install 'sana-python[gradio]'.") from error


def choose_port(option: int | None, variable: str | None) -> int:
    """Returns the port: the option's, else that of DEMO_PORT, else the released app's.

    Raises:
        ValueError: it is no port.
    """
    name, value = ("port", option) if option is not None else ("DEMO_PORT", variable or PORT)
    number = int(value) if str(value).isdecimal() else -1
    if not 0 <= number <= MAX_PORT:
        raise ValueError(f"{name} must be a whole number from 0 (any free port) to {MAX_PORT}, not {value!r}.")
    return number


def read_logins(user: str | None, password: str | None, file: str | None) -> tuple[tuple[str, str], ...]:
    """Returns names and passwords.

    Args:
        user, password: of one person.
        file: of several, one `name:password` a line; empty lines and lines that begin with # do not count.

    Raises:
        ValueError: one of two is missing, both ways were given, or a line of the file is no login.
        OSError: the file cannot be read.
    """
    if file is not None and (user is not None or password is not None):
        raise ValueError("password_file was given beside user or password; give one of both ways.")
    if file is None:
        if (user is None) != (password is None):
            raise ValueError("user and password belong together; one of them is missing.")
        pairs = [(user or "", password or "")] if user is not None else []
        if any(not all(pair) for pair in pairs):
            raise ValueError("user and password must not be empty.")
        return tuple(pairs)
    lines = [line.strip() for line in Path(file).expanduser().read_text(encoding="utf-8").splitlines()]
    logins = []
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        name, colon, word = line.partition(":")
        if not (name and colon and word):
            raise ValueError(f"Line {number} of {file} is not of the form name:password.")
        logins.append((name, word))
    if not logins:
        raise ValueError(f"{file} holds no login; write one name:password a line.")
    return tuple(logins)


def free_port(host: str, port: int) -> int:
    """Returns the port, a free one for 0, after listening there for a moment.

    Raises:
        OSError: nobody can listen there: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise OSError(
            f"Cannot listen at {host}, port {port}: {error.strerror or error}; give another --port."
        ) from error


def address(host: str, port: int) -> str:
    """Returns the URL of the page for somebody on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def open_door(demo: Any, door: Door, settings: dict[str, Any], on_ready: Callable[[str], None]) -> int:
    """Shows the page until SIGTERM or Ctrl-C.

    Args:
        demo: a `gradio.Blocks` with a queue.
        door: its port is not 0.
        settings: more arguments of `launch`.
        on_ready: called with the address, and then with the public link if there is one.

    Returns:
        0, the exit code of a process that was asked to end.

    Raises:
        FetchError: there is no public link, though it was asked for.
        OSError: nobody can listen there.
    """
    if (door.share or door.host not in THIS_MACHINE) and not door.logins:
        logger.warning("whoever reaches the page can use it: no password was given")
    with asked_to_end() as asked:
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:  # standard output is for addresses alone
                demo.launch(
                    server_name=f"[{door.host}]" if ":" in door.host else door.host,
                    server_port=door.port,
                    share=door.share,
                    auth=list(door.logins) or None,
                    prevent_thread_lock=True,
                    quiet=True,
                    ssr_mode=False,
                    enable_monitoring=False,
                    max_file_size=UPLOAD,
                    **settings,
                )
            logger.debug("Gradio says: %s", said.getvalue())
            if door.share and not demo.share_url:
                raise FetchError("No public link could be made: Gradio's service was not reached; try without --share.")
            on_ready(address(door.host, door.port))
            if door.share:
                on_ready(demo.share_url)
            asked.wait()
        finally:
            demo.close(verbose=False)
    return 0


@contextlib.contextmanager
def asked_to_end() -> Iterator[threading.Event]:
    """Gives an event that SIGTERM and SIGINT set; a second signal acts as it would have without this."""
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
