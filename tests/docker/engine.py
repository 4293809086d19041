"""Building and running the image: by Docker where it answers, else in a sandbox that carries the same lines out."""

import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.docker.dockerfile import parse, substitute
from tests.docker.sandbox import Sandbox, stop

ROOT = Path(__file__).parents[2]
OFFICIAL = ("--ipc=host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864")


def wait_for(
    condition: Callable[[], bool], alive: Callable[[], bool], log: Callable[[], str], seconds: float = 180
) -> None:
    """Waits until a condition holds; fails, with the log, when what it waits for has ended or after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert alive(), f"the container has ended: {log()}"
        assert time.monotonic() < end, f"not within {seconds} s: {log()}"
        time.sleep(0.5)


def read(url: str) -> str:
    """Returns what an address of this machine answers, proxies not asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        return answer.read().decode()


class DockerEngine:
    """The image and its containers through the command `docker`."""

    def __init__(self, folder: Path, port: int) -> None:
        self.tag, self.port, self._cache, self._container = f"sana-test-{os.getpid()}", port, folder / "cache", ""
        self._cache.mkdir(parents=True)
        self._cache.chmod(0o1777)

    @staticmethod
    def answers() -> bool:
        """Returns whether there is a container engine."""
        if shutil.which("docker") is None:
            return False
        return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0

    def _docker(self, *words: str) -> str:
        done = subprocess.run(["docker", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr[-3000:]}"
        return done.stdout.strip()

    def build(self) -> None:
        self._docker("build", ".", "-t", self.tag)

    def run(self, *words: str, user: str = "") -> subprocess.CompletedProcess[str]:
        options = ("--user", user) if user else ()
        line = ["docker", "run", "--rm", *options, "-v", f"{self._cache}:/root/.cache", self.tag, *words]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    def start(self) -> None:
        published = f"127.0.0.1:{self.port}:15432"
        volume = f"{self._cache}:/root/.cache"
        self._container = self._docker("run", "-d", *OFFICIAL, "-v", volume, "-p", published, self.tag)

    def _state(self, what: str) -> str:
        return self._docker("inspect", "--format", f"{{{{.State.{what}}}}}", self._container)

    def is_alive(self) -> bool:
        return self._state("Running") == "true"

    def is_healthy(self) -> bool:
        return self._state("Health.Status") == "healthy"

    def stop(self) -> int:
        self._docker("stop", "--time", "60", self._container)
        return int(self._state("ExitCode"))

    def log(self) -> str:
        done = subprocess.run(["docker", "logs", self._container], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def close(self) -> None:
        for words in (["rm", "-f", self._container] if self._container else [], ["image", "rm", "-f", self.tag]):
            if words:
                subprocess.run(["docker", *words], capture_output=True, check=False)


class SandboxEngine:
    """The same, by carrying the lines of the Dockerfile out in a sandbox."""

    def __init__(self, folder: Path, port: int) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.port, self._log, self._process = port, folder / "log", None
        self._sandbox = Sandbox(folder / "sandbox", ROOT, cache / "pip")
        self.instructions = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))

    def _last(self, name: str) -> list[str]:
        words = [one.words() for one in self.instructions if one.name == name][-1]
        assert words is not None
        return words

    def _variables(self) -> dict[str, str]:
        return {"DEMO_PORT": str(self.port), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def build(self) -> None:
        self._sandbox.build(self.instructions)

    def run(self, *words: str, user: str = "") -> subprocess.CompletedProcess[str]:
        line = self._sandbox.command([*self._last("ENTRYPOINT"), *words], self._variables(), process_1=True, user=user)
        return subprocess.run(line, capture_output=True, text=True, check=False)

    def start(self) -> None:
        words = [*self._last("ENTRYPOINT"), *self._last("CMD")]
        line = self._sandbox.command(words, self._variables(), process_1=True)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_healthy(self) -> bool:
        check = next(one for one in self.instructions if one.name == "HEALTHCHECK")
        value = substitute(check.value.removeprefix("CMD").strip(), {})
        words = type(check)("CMD", value).words() or ["/bin/sh", "-c", value]
        line = self._sandbox.command(words, self._variables())
        return subprocess.run(line, capture_output=True, check=False).returncode == 0

    def stop(self) -> int:
        assert self._process is not None
        return stop(self._process)

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # and with it, by --kill-child, what it started
            self._process.wait()
        self._sandbox.close()
