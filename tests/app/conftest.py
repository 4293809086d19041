"""The bundled model, a model of some kilobytes, and the web app as a process, for all tests of this folder."""

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sana.pipelines.sana_pipeline import SanaPipeline
from tests.tiny_model import make_model_folder

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "asset/models/sana_tiny"
WAIT = 120  # seconds, on a busy machine


@pytest.fixture(scope="session")
def bundled() -> SanaPipeline:
    return SanaPipeline.from_pretrained(BUNDLED, device="cpu")


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes pictures of 64 x 64 pixels, of random weights."""
    return make_model_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def small(small_folder: Path) -> SanaPipeline:
    return SanaPipeline.from_pretrained(small_folder, device="cpu")


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment of an app: no network, one thread, no settings of the person who runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "DEMO_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables


class AppProcess:
    """`python app/app_sana.py` as a user starts it.

    Args:
        arguments: of the command; a free port is asked for unless they name one.
        cwd: where it is started.
        variables: of its environment.
    """

    def __init__(self, *arguments: str, cwd: Path = ROOT, **variables: str) -> None:
        port = [] if "DEMO_PORT" in variables or any(one.startswith("--port") for one in arguments) else ["--port=0"]
        command = [sys.executable, str(ROOT / "app/app_sana.py"), *port, *arguments]
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._log: list[str] = []
        self._readers = [threading.Thread(target=self._read_out), threading.Thread(target=self._read_log)]
        for reader in self._readers:
            reader.start()
        self.url = self.line()

    def line(self) -> str:
        """Returns the next line of standard output."""
        line = self._lines.get(timeout=WAIT)
        assert line is not None, f"the app ended: {self.log}"
        return line

    @property
    def log(self) -> str:
        """What was written on standard error."""
        return "".join(self._log)

    @property
    def ended_silently(self) -> bool:
        """Whether standard output ended without another line."""
        return self._lines.get(timeout=WAIT) is None

    def end(self, number: int = signal.SIGTERM) -> int:
        """Asks the process to end and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Returns the exit code of a process that is about to end."""
        try:
            return self.process.wait(timeout=WAIT)
        finally:
            self.process.kill()
            for reader in self._readers:
                reader.join(WAIT)

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        self._log.extend(iter(self.process.stderr.readline, ""))
